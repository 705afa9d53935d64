"""What tokenizer compression merges (docs/spec.md section 1.1, paper table 6)."""

from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from engram_jax.hashing.compression import CompressedVocabulary


class Compression(NamedTuple):
    """How much smaller a tokenizer becomes, and its largest classes.

    Attributes:
      raw, canonical: how many ids there are before and after.
      sizes: how many classes there are of each size, the largest first.
      largest: the largest classes: (the text that stands for it, some of its members, its size).
    """

    raw: int
    canonical: int
    sizes: dict[int, int]
    largest: list[tuple[str, list[str], int]]

    @property
    def reduction(self) -> float:
        """The share of ids that goes."""
        return 1 - self.canonical / self.raw


def compression(tokenizer: Tokenizer, count: int = 10, members: int = 12) -> Compression:
    """What compression does to a tokenizer's vocabulary.

    Args:
      tokenizer: any.
      count: largest classes that are told.
      members: of each that are shown.

    Raises:
      UserError: the tokenizer has no token.
    """
    vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
    size_C = np.bincount(vocabulary.lookup)
    sizes, times = np.unique(size_C, return_counts=True)
    order_C = np.argsort(-size_C, kind="stable")
    largest = []
    for number in order_C[:count].tolist():
        ids = np.flatnonzero(vocabulary.lookup == number)[:members].tolist()
        texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        largest.append((min(texts, key=len).strip().lower() or " ", texts, int(size_C[number])))
    return Compression(raw=vocabulary.lookup.size, canonical=vocabulary.size,
                       sizes=dict(zip(sizes[::-1].tolist(), times[::-1].tolist(), strict=True)),
                       largest=largest)
