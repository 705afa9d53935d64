"""What a trained run thinks of given tokens: the loss of each, and what it would have said.

The tables may lie on the device, in host memory or on a disk; sequences go through the network
whole, without a cache. Shapes: B sequences, T tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from engram_jax.config import ModelConfig, require
from engram_jax.inference.serving import Served
from engram_jax.model import transformer
from engram_jax.model.layers import as_they_are
from engram_jax.model.loss import token_scores

SHORTEST = 32  # sequences are filled up to this times a power of two, so that few programs compile


class Scores(NamedTuple):
    """losses_BT float32: nats of each target; greedy_BT bool: whether it was the likeliest."""

    losses_BT: np.ndarray
    greedy_BT: np.ndarray


class Scorer:
    """Scores tokens with a served run.

    Args:
      model: the run.
      batch_size: sequences in one call of the network; fewer are filled up.

    Raises:
      UserError: a batch size below 1.
    """

    def __init__(self, model: Served, batch_size: int = 8):
        require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
        self.model, self.batch_size = model, batch_size
        self._network = jax.jit(functools.partial(_scores, model.run.model))

    def __call__(self, tokens_BT: np.ndarray, targets_BT: np.ndarray) -> Scores:
        """The scores of `targets_BT`, each behind the tokens up to and with its own place.

        Args:
          tokens_BT: raw ids that are read, int32.
          targets_BT: raw ids that are to follow, int32.

        Raises:
          UserError: shapes that differ, or ids that the tokenizer does not have.
        """
        require(tokens_BT.shape == targets_BT.shape and tokens_BT.ndim == 2, "targets.shape",
                targets_BT.shape, f"must be {tokens_BT.shape}, that of the tokens [B, T]")
        parts = [self._batch(tokens_BT[at:at + self.batch_size],
                             targets_BT[at:at + self.batch_size])
                 for at in range(0, len(tokens_BT), self.batch_size)]
        return Scores(*map(np.concatenate, zip(*parts, strict=True)))

    def losses(self, tokens_T: np.ndarray) -> np.ndarray:
        """Of one text, nats of each token given those before it, float32 [T]; the first one's is 0.

        Raises:
          UserError: ids that the tokenizer does not have.
        """
        if len(tokens_T) < 2:
            return np.zeros(len(tokens_T), np.float32)
        scores = self(tokens_T[None, :-1].astype(np.int32), tokens_T[None, 1:].astype(np.int32))
        return np.concatenate([np.zeros(1, np.float32), scores.losses_BT[0]])

    def _batch(self, tokens_BT: np.ndarray, targets_BT: np.ndarray) -> Scores:
        (count, time), model = tokens_BT.shape, self.model
        length = SHORTEST
        while length < time:
            length *= 2
        filled = np.full((2, self.batch_size, length), model.reader.pad_id, np.int32)
        filled[0, :count, :time], filled[1, :count, :time] = tokens_BT, targets_BT
        starts_BT = np.zeros(filled[0].shape, bool)
        starts_BT[:, 0] = True
        starts_BT[:, 1:] = filled[0, :, :-1] == model.reader.end_id
        rows = dict(model.rows.request(filled[0]))
        losses_BT, greedy_BT = self._network(
            model.params, model.router_bias, rows, filled[0], filled[1], starts_BT)
        return Scores(np.asarray(losses_BT)[:count, :time], np.asarray(greedy_BT)[:count, :time])


def _scores(
    config: ModelConfig, params: dict[str, Any], router_bias: Any, rows: dict[str, jax.Array],
    tokens_BT: jax.Array, targets_BT: jax.Array, starts_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x_BTMD, _ = transformer.body(params, tokens_BT, rows, router_bias, config, starts_BT)
    head = transformer.head_params(params, config, as_they_are)
    losses_BT, best_BT = token_scores(head, x_BTMD, targets_BT, config)
    return losses_BT, best_BT == targets_BT
