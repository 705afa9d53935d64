"""Texts that analyses read: from a file or a run's validation data, in batches of the run's shape.

Shapes: B batch, T time, N tokens of the text, P positions, S spans.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from engram_jax.config import RunConfig, require
from engram_jax.insides.observing import Opened
from engram_jax.runs import reader

BATCHES = 8  # of the text that an analysis reads
KEPT = 2**31  # bytes of streams after all blocks, of a batch that is observed


class Text:
    """A text as a run reads it, in batches of the run's shape, or of fewer sequences.

    Attributes:
      text: itself.
      tokens_N: its tokens, int32 [N].

    Raises:
      UserError: it is shorter than one sequence.
    """

    def __init__(self, opened: Opened, text: str):
        data = opened.run.data
        self._encoding = opened.encoded(text)
        self.text, self.tokens_N = text, np.array(self._encoding.ids, np.int32)
        self._length = data.sequence_length + 1
        count = self.tokens_N.size // self._length
        require(count >= 1, "text", f"{self.tokens_N.size} tokens",
                f"must have at least {self._length}, one sequence of {opened.name}")
        self._size = min(sequences(opened.run), count)
        self._whole = count // self._size

    @property
    def offsets_N2(self) -> np.ndarray:
        """Where each token starts and ends in the text, characters, int64 [N, 2]."""
        return np.array(self._encoding.offsets, np.int64).reshape(-1, 2)

    def batches(self, count: int = BATCHES) -> Iterator[np.ndarray]:
        """Tokens [B, T + 1], whole batches from the start of the text."""
        return (self._batch(self.tokens_N, number) for number in range(min(count, self._whole)))

    def inputs(self) -> Iterator[np.ndarray]:
        """The same without the last token of each sequence."""
        return (tokens[:, :-1] for tokens in self.batches())

    def ends(self, tokens_S2: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every batch of inputs in which spans end, [B, T], and where, int64 [P] of its B * T.

        Args:
          tokens_S2: first and last token of each span; one that a sequence's border cuts is left
            out.
          most: how many positions there are at most in all batches together.
        """
        same_S = np.equal(*(tokens_S2 // self._length).T)
        ends_N = np.zeros(self.tokens_N.size, bool)
        ends_N[tokens_S2[same_S, 1]] = True
        for number in range(self._whole):
            positions_P = np.flatnonzero(self._batch(ends_N, number)[:, :-1])[:most]
            most -= positions_P.size
            if positions_P.size:
                yield self._batch(self.tokens_N, number)[:, :-1], positions_P

    def _batch(self, each_N: np.ndarray, number: int) -> np.ndarray:
        tokens = self._length * self._size
        return each_N[number * tokens : (number + 1) * tokens].reshape(self._size, self._length)


def sequences(run: RunConfig) -> int:
    """How many an analysis reads at a time: a batch of the run, or as many as can be observed."""
    model = run.model
    each = ((model.depth + 1) * run.data.sequence_length * model.streams * model.width
            * jnp.dtype(model.compute_dtype).itemsize)
    return max(1, min(run.data.batch_size, KEPT // each))


def validation_text(opened: Opened) -> str:
    """The beginning of a run's validation text, twice as much as analyses read; a blank line
    between documents.

    Raises:
      UserError: the text is not the one that the run was trained on.
    """
    data = opened.run.data
    return reader.validation_text(
        opened.run, 2 * BATCHES * sequences(opened.run) * (data.sequence_length + 1),
        opened.fingerprint)
