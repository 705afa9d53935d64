"""A run whose numbers are no longer finite stops, and says at which step."""

import math
from collections.abc import Mapping

from engram_jax.errors import MachineError

WATCHED = ("learning/loss", "learning/grad_norm")


class Diverged(MachineError):
    """A run that came to nothing; its last good checkpoint is as it was."""


class Divergence:
    """Counts the steps in a row that were skipped.

    Args:
      most: how many may follow one another (`training.skips_in_a_row`).

    Attributes:
      skips: how many there are now. While there are any, the state is not known to be good.
    """

    def __init__(self, most: int):
        self._most = most
        self.skips = 0

    def watch(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done.

        Raises:
          Diverged: too many in a row were skipped.
        """
        lost = [name for name in WATCHED if not math.isfinite(metrics.get(name, 0.0))]
        self.skips = self.skips + 1 if lost else 0
        if self.skips > self._most:
            raise Diverged(
                f"diverged at step {step - self.skips + 1}: {lost[0]} is {metrics[lost[0]]} there "
                f"and in the {self._most} steps after it (training.skips_in_a_row); a lower "
                "optimizer.learning_rate or a longer warm-up may help")

    def watch_evaluation(self, step: int, loss: float) -> None:
        """An evaluation is done.

        Raises:
          Diverged: its loss is not finite.
        """
        if not math.isfinite(loss):
            raise Diverged(f"diverged at step {step}: the evaluation's loss is {loss}; a lower "
                           "optimizer.learning_rate or a longer warm-up may help")
