"""Several sources as one: documents in turn, so that each source gets its share of the bytes.

The order depends on the texts and the shares alone. The next document is always of the source that
has had least for its share, the first of several alike. Where that source has no more, the mixture
ends: no document comes twice, which would put the same text into training and validation, and the
shares hold from the beginning to the end.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from engram_jax.config import require
from engram_jax.data.reading import Part


class Share(NamedTuple):
    """A source of a mixture and its weight against the others."""

    path: str
    weight: float


def parsed_shares(mixture: Sequence[str]) -> list[Share]:
    """The shares of `data.mixture`, each written "PATH=WEIGHT".

    Raises:
      UserError: another form, a weight that is not positive, or a path that comes twice.
    """
    shares: list[Share] = []
    for entry in mixture:
        path, _, weight = entry.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        require(bool(path) and 0 < number < math.inf, "data.mixture", entry,
                "must be PATH=WEIGHT with a positive weight, as text.jsonl=0.7")
        require(path not in [share.path for share in shares], "data.mixture", entry,
                "names a source that comes before")
        shares.append(Share(path, number))
    return shares


def mixed(sources: Sequence[Iterator[Part]], weights: Sequence[float]) -> Iterator[Part]:
    """The documents of all sources in the order of the mixture."""
    given = [0] * len(sources)  # bytes
    while True:
        number = min(range(len(sources)), key=lambda each: given[each] / weights[each])
        ends = False
        while not ends:
            part = next(sources[number], None)
            if part is None:
                return
            given[number] += len(part.text.encode())
            ends = part.ends
            yield part


def stamp(stamps: Sequence[Any], shares: Sequence[Share]) -> Any:
    """The stamp of a mixture; None if a source has none."""
    if any(each is None for each in stamps):
        return None
    return [[each, share.weight] for each, share in zip(stamps, shares, strict=True)]
