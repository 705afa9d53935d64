"""A run's perplexity on long texts: on their key tokens (LongPPL), on all, and by position.

Shapes: T tokens of a text, N texts.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from engram_jax.config import require
from engram_jax.evaluation.longppl import (
    KeyTokens,
    Perplexities,
    Spans,
    by_position,
    key_tokens,
    of_losses,
    spans_of,
    tokens_of,
)
from engram_jax.evaluation.scoring import Scorer
from engram_jax.inference.serving import Served
from engram_jax.results.scores import Score
from engram_jax.settings import json_text
from engram_jax.storage import read_json, write_text

FIRST_EDGE = 16  # the first band of positions ends here or up to twice as far
Characters = list[tuple[int, int]]


class Masked(NamedTuple):
    """A text, and the characters of its key tokens."""

    text: str
    spans: Spans


class Measured(NamedTuple):
    """Perplexities of all texts, the length that positions are told of, and (first, last, value) of
    each band of positions; a position is how many tokens were read before."""

    perplexities: Perplexities
    length: int
    positions: list[tuple[int, int, float]]


def pieces(model: Served, text: str, length: int, most: int) -> list[str]:
    """A text in pieces of `length` tokens of a run, `most` at most; what is left over is dropped.

    Raises:
      UserError: a length that the run does not read, or a text that is shorter.
    """
    require(2 <= length <= model.length, "length", length, f"must be in 2..{model.length}, what "
            "the run was trained at or extended to")
    require(most >= 1, "limit", most, "must be at least 1")
    offsets = _encoded(model, text).offsets
    require(len(offsets) >= length, "text", f"{len(offsets)} tokens",
            f"is shorter than one piece of {length} tokens; name a longer one with --text, or a "
            "shorter --length")
    starts = range(0, min(len(offsets) - length + 1, most * length), length)
    return [text[offsets[start][0]:offsets[start + length - 1][1]] for start in starts]


def masked_by(
    evaluator: Served, texts: Sequence[str], rule: KeyTokens, batch_size: int = 8
) -> list[Masked]:
    """The key tokens of texts as a run tells them.

    Raises:
      UserError: a text that is longer than the evaluator reads, or not longer than a window.
    """
    scorer, masked = Scorer(evaluator, batch_size), []
    for text in texts:
        encoded = _encoded(evaluator, text)
        count = len(encoded.ids)
        require(count <= evaluator.length, "longppl", evaluator.run.name,
                f"reads {evaluator.length} tokens, and a text has {count} in its tokenizer")
        require(rule.window < count, "window", rule.window,
                f"must be below the {count} tokens of a text, or no token could be key")
        key_N = key_tokens(scorer.losses, np.array(encoded.ids, np.int32), rule)
        masked.append(Masked(text, spans_of(key_N, encoded.offsets)))
    return masked


def read_masks(path: epath.PathLike) -> list[Masked]:
    """Texts with their key characters, from a file of JSON:
    {"texts": [{"text": "...", "spans": [[begin, end], ...]}, ...]}.

    Raises:
      UserError: a file of another form.
    """
    name = str(path)
    listed: Any = read_json(epath.Path(path).expanduser()).get("texts")
    require(isinstance(listed, list) and bool(listed), f"{name}: texts", type(listed).__name__,
            "must be a list of texts")
    return [_mask(f"{name}: texts[{number}]", each) for number, each in enumerate(listed)]


def _mask(where: str, values: Any) -> Masked:
    require(isinstance(values, dict) and isinstance(values.get("text"), str), where,
            str(values)[:60], 'must be an object with "text" and "spans"')
    text, spans = values["text"], values.get("spans")
    whole = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        for span in spans)
    require(whole, f"{where}.spans", str(spans)[:60], "must be a list of [begin, end]")
    ends = [end for span in spans for end in span]
    ascend = all(a < b for a, b in spans) and all(
        a[1] <= b[0] for a, b in itertools.pairwise(spans))
    require(ascend and all(0 <= end <= len(text) for end in ends), f"{where}.spans",
            str(spans)[:60], f"must ascend within the text's {len(text)} characters")
    return Masked(text, [(begin, end) for begin, end in spans])


def write_masks(path: epath.PathLike, masked: Sequence[Masked]) -> None:
    """Write what `read_masks` reads.

    Raises:
      MachineError: the file cannot be written.
    """
    write_text(epath.Path(path).expanduser(), json_text({"texts": [
        {"text": each.text, "spans": [list(span) for span in each.spans]} for each in masked]},
        indent=1) + "\n")


def measured(model: Served, masked: Sequence[Masked], batch_size: int = 8) -> Measured:
    """A run's perplexities on texts.

    Args:
      model: the run.
      masked: the texts; without spans there are no key tokens.
      batch_size: of the scorer.

    Raises:
      UserError: a text that is longer than the run reads.
    """
    scorer, told = Scorer(model, batch_size), []
    for text, spans in masked:
        encoded = _encoded(model, text)
        require(len(encoded.ids) <= model.length, "text", f"{len(encoded.ids)} tokens",
                f"is longer than the {model.length} that the run was trained at or extended to")
        told.append((scorer.losses(np.array(encoded.ids, np.int32)),
                     tokens_of(spans, encoded.offsets)))
    length = min(len(losses_T) for losses_T, _ in told)
    perplexities = of_losses(told)
    ends = edges(length)
    bands = by_position(np.stack([losses_T[:length] for losses_T, _ in told]), ends)
    return Measured(perplexities, length, [
        (begin, end - 1, value)
        for (begin, end), value in zip(itertools.pairwise(ends), bands, strict=True)])


def edges(length: int) -> list[int]:
    """Bands of positions below `length`, each twice as wide as what lies before it."""
    ends = [length]
    while ends[0] >= 2 * FIRST_EDGE:
        ends.insert(0, (ends[0] + 1) // 2)
    return [1, *ends] if ends[0] > 1 else ends


def _encoded(model: Served, text: str) -> Any:
    return model.reader.tokenizer.encode(text, add_special_tokens=False)


def scores(values: Measured, step: int, settings: dict[str, Any]) -> list[Score]:
    """What scores.json keeps."""
    def score(of: str, metric: str, value: float) -> Score:
        return Score(of=of, task=of, metric=metric, step=step, value=value,
                     settings={"length": values.length, **settings})

    long, plain = values.perplexities.long, values.perplexities.plain
    return [*([] if long is None else [score("longppl", "", long)]),
            score("positions", "all", plain),
            *(score("positions", f"{first}-{last}", value)
              for first, last, value in values.positions)]


def to_json(values: Measured) -> dict[str, Any]:
    """The perplexities as plain values."""
    numbers = values.perplexities
    return {"longppl": numbers.long, "perplexity": numbers.plain, "key_tokens": numbers.key_tokens,
            "tokens": numbers.tokens, "by_position": [
                {"first": first, "last": last, "perplexity": value}
                for first, last, value in values.positions]}


def described(values: Measured) -> str:
    """The perplexities in words, and a line for each band of positions."""
    numbers = values.perplexities
    long = ("LongPPL: no key tokens" if numbers.long is None
            else f"LongPPL {numbers.long:.4f} on {numbers.key_tokens:,} key tokens")
    lines = [f"{long}; perplexity {numbers.plain:.4f} on {numbers.tokens:,} tokens",
             f"{'tokens before':>15}{'perplexity':>12}"]
    return "\n".join([*lines, *(f"{f'{first:,} to {last:,}':>15}{value:>12.4f}"
                                for first, last, value in values.positions)])
