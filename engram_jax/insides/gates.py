"""Gates: how much of what memory found each token lets in.

Shapes: B batch, T time, M streams.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from engram_jax.config import require
from engram_jax.insides.observing import Opened


class TokenGates(NamedTuple):
    """A text and its gates.

    Attributes:
      pieces: what each token shows of the text; together they are the text. A token that ends
        inside a character shows nothing, the one that ends it shows it all.
      gates: for each Engram layer, float32 [T, M].
    """

    pieces: list[str]
    gates: dict[int, np.ndarray]


def require_memory(opened: Opened) -> None:
    """Refuse a run that has no gates (UserError)."""
    engram = opened.run.model.engram
    require(engram is not None, "run", opened.name,
            "has no Engram, so there is nothing of it to look at")
    require(engram is not None and engram.gated, "run", opened.name,
            "has an Engram without a gate, so there is nothing of it to look at")


def of_text(opened: Opened, text: str) -> TokenGates:
    """The gates of every token of a text in any script.

    Raises:
      UserError: the run has no Engram, or the text no token.
    """
    return of_texts(opened, [text])[0]


def of_texts(opened: Opened, texts: Sequence[str]) -> list[TokenGates]:
    """The gates of every token of each text, in one pass.

    A text that is longer than the run's sequences is read in such, each from its own start.

    Raises:
      UserError: the run has no Engram, or a text no token.
    """
    require_memory(opened)
    cut = [opened.tokens(text) for text in texts]
    for text, tokens_T in zip(texts, cut, strict=True):
        require(tokens_T.size > 0, "text", text, "has no token")
    most = opened.run.data.sequence_length
    parts = [tokens_T[start : start + most]
             for tokens_T in cut for start in range(0, len(tokens_T), most)]
    tokens_BT = np.full((len(parts), max(map(len, parts))), opened.reader.pad_id, np.int32)
    for row, part_T in enumerate(parts):
        tokens_BT[row, : len(part_T)] = part_T  # what pads comes after, and is not seen
    ends = np.cumsum([len(tokens_T) for tokens_T in cut])[:-1]
    layers = {layer: np.split(np.concatenate(
        [np.asarray(gate_TM[: len(part_T)])
         for gate_TM, part_T in zip(gate_BTM, parts, strict=True)]), ends)
        for layer, gate_BTM in opened.observe(tokens_BT).gates.items()}
    return [TokenGates(pieces(opened, tokens_T),
                       {layer: split[number] for layer, split in layers.items()})
            for number, tokens_T in enumerate(cut)]


def pieces(opened: Opened, tokens_T: np.ndarray) -> list[str]:
    """What each token adds to the decoded text."""
    decode = opened.reader.tokenizer.decode
    pieces, before = [], ""
    for stop in range(1, len(tokens_T) + 1):
        text = decode(tokens_T[:stop].tolist(), skip_special_tokens=False)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if stop == len(tokens_T):
            whole = text
        pieces.append(whole[len(before):])
        before = max(before, whole, key=len)
    return pieces


class Extremes(NamedTuple):
    """N-grams with the highest and the lowest mean gates, best first: (text, gate, times)."""

    highest: list[tuple[str, float, int]]
    lowest: list[tuple[str, float, int]]


def extremes(
    opened: Opened, batches: Iterable[np.ndarray], layer: int, order: int = 2, count: int = 20,
    least: int = 5,
) -> Extremes:
    """The n-grams of a corpus that open and shut a layer's gate most, over all branches.

    Args:
      opened: the run.
      batches: raw tokens, int32 [B, T] each.
      layer: of the module.
      order: tokens of an n-gram; the gate is that of its last.
      count: how many of each.
      least: times that an n-gram must have come.

    Raises:
      UserError: the run has no Engram, or none in that layer.
    """
    require_memory(opened)
    engram = opened.run.model.engram
    assert engram is not None
    require(layer in engram.layers, "layer", layer, f"must be one of {engram.layers}")
    sums: dict[tuple[int, ...], list[float]] = {}
    for tokens_BT in batches:
        gate_BT = np.asarray(opened.observe(tokens_BT).gates[layer]).mean(axis=-1)
        windows = np.lib.stride_tricks.sliding_window_view(tokens_BT, order, axis=1)
        for ngram, gate in zip(windows.reshape(-1, order).tolist(),
                               gate_BT[:, order - 1:].reshape(-1).tolist(), strict=True):
            entry = sums.setdefault(tuple(ngram), [0.0, 0])
            entry[0] += gate
            entry[1] += 1
    means = [(total / times, ngram, int(times)) for ngram, (total, times) in sums.items()
             if times >= least]

    def told(chosen: list[tuple[float, tuple[int, ...], int]]) -> list[tuple[str, float, int]]:
        return [(opened.reader.tokenizer.decode(list(ngram)), gate, times)
                for gate, ngram, times in chosen]

    return Extremes(told(heapq.nlargest(count, means)), told(heapq.nsmallest(count, means)))


def pattern_branch(opened: Opened, batches: Iterable[np.ndarray], layer: int) -> np.ndarray:
    """How much each branch's gate follows pattern completion: correlations, float64 [M].

    A token completes a pattern as far as the model was sure of it before: the correlation is that
    of the gate at a token with the probability that the model gave this token; 0 for a gate that
    never changes.
    """
    require_memory(opened)
    gates, sure = [], []
    for tokens_BT in batches:
        seen = opened.observe(tokens_BT)
        # The last position has no next token; its target is any.
        losses_BT = np.asarray(opened.losses(seen.streams[-1], np.roll(tokens_BT, -1, axis=1)))
        sure.append(np.exp(-losses_BT[:, :-1].astype(np.float64)).ravel())
        gates.append(np.asarray(seen.gates[layer])[:, 1:].reshape(-1, seen.gates[layer].shape[-1]))
    columns = np.concatenate(gates).T
    return np.array([np.corrcoef(column, np.concatenate(sure))[0, 1] if np.ptp(column) else 0.0
                     for column in columns])
