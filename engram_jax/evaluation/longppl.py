"""LongPPL: perplexity on the tokens that a long context helps with (arXiv 2410.23771).

An evaluator model reads a text twice: whole, and through short windows. A token is key if the whole
text makes it much likelier than its window does, and likely. LongPPL of a model is its perplexity
on these tokens alone. Defaults are the paper's, windows as in its authors' package.

Shapes: T tokens of a text; losses [T] are in nats, that of token t given all tokens before it that
were read with it; the first one's has no meaning.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from engram_jax.config import require

Losses = Callable[[np.ndarray], np.ndarray]  # int32 [T] to float [T]
Spans = list[tuple[int, int]]  # of characters: begin, end


class KeyTokens(NamedTuple):
    """How a token is told to be key.

    Attributes:
      gain: alpha, nats that the whole text must gain over the window.
      likely: -beta, the most nats that the token may cost with the whole text.
      window: K, tokens that every window has at least before what it predicts.
      slide: tokens that share a window.
    """

    gain: float = 2.0
    likely: float = 2.0
    window: int = 4096
    slide: int = 1024


PAPER = KeyTokens()


def key_tokens(losses: Losses, tokens_T: np.ndarray, rule: KeyTokens = PAPER) -> np.ndarray:
    """The numbers of the key tokens of a text, ascending int64.

    Args:
      losses: of the evaluator.
      tokens_T: int32, the text; tokens up to the first window's length are never key.
      rule: what makes a token key.

    Raises:
      UserError: a window or slide below 1.
    """
    for name in ("window", "slide"):
        require(getattr(rule, name) >= 1, f"longppl.{name}", getattr(rule, name),
                "must be at least 1")
    whole_T = losses(tokens_T)
    short_T = np.full(len(tokens_T), -np.inf)
    for start in range(0, len(tokens_T) - rule.window, rule.slide):
        first, last = start + rule.window, min(start + rule.window + rule.slide, len(tokens_T))
        short_T[first:last] = losses(tokens_T[start:last])[rule.window:]
    return np.flatnonzero((short_T - whole_T > rule.gain) & (whole_T < rule.likely))


class Perplexities(NamedTuple):
    """long: LongPPL, None without key tokens; plain: of all tokens but the first of each text; and
    how many tokens each is of."""

    long: float | None
    plain: float
    key_tokens: int
    tokens: int


def perplexities(
    losses: Losses, texts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Perplexities:
    """Of texts, each its tokens and the numbers of its key tokens.

    All key tokens count alike, whichever text they stand in.

    Raises:
      UserError: no text has two tokens.
    """
    return of_losses((losses(tokens_T), key_N) for tokens_T, key_N in texts)


def of_losses(texts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Perplexities:
    """As `perplexities`, of texts whose losses [T] are known."""
    key_sum, key_count, total, count = 0.0, 0, 0.0, 0
    for losses_T, key_N in texts:
        key_sum, key_count = key_sum + float(losses_T[key_N].sum()), key_count + len(key_N)
        total, count = total + float(losses_T[1:].sum()), count + max(0, len(losses_T) - 1)
    require(count > 0, "texts", count, "must have at least two tokens in one of them")
    return Perplexities(math.exp(key_sum / key_count) if key_count else None,
                        math.exp(total / count), key_count, count)


def by_position(losses_NT: np.ndarray, edges: Sequence[int]) -> list[float]:
    """Perplexity of the tokens at positions from each edge up to the next one.

    Args:
      losses_NT: of N texts of one length.
      edges: ascending, in 1..T.

    Raises:
      UserError: edges that are not.
    """
    inside = all(1 <= a < b for a, b in itertools.pairwise(edges))
    require(len(edges) >= 2 and inside and edges[-1] <= losses_NT.shape[1], "edges", edges,
            f"must be at least two, ascend, and lie in 1..{losses_NT.shape[1]}")
    return [math.exp(float(losses_NT[:, begin:end].mean()))
            for begin, end in itertools.pairwise(edges)]


# --- Between tokenizers ---


def spans_of(key_N: np.ndarray, offsets: Sequence[tuple[int, int]]) -> Spans:
    """The characters of key tokens; neighbours are one span."""
    spans: Spans = []
    for begin, end in (offsets[number] for number in key_N):
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((begin, end))
    return spans


def tokens_of(spans: Spans, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The tokens whose characters all lie in one of the spans, without the text's first one.

    Args:
      spans: ascending, of the same text.
      offsets: of every token, the characters that it stands for.
    """
    key, at = [], 0
    for number, (begin, end) in enumerate(offsets):
        while at < len(spans) and spans[at][1] < end:
            at += 1
        if number and at < len(spans) and begin >= spans[at][0] and end > begin:
            key.append(number)
    return np.array(key, np.int64)
