"""TensorBoard events beside metrics.jsonl, with MaxText's metric names (extra `tensorboard`)."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from engram_jax.distributed import is_first
from engram_jax.errors import UserError


class TensorBoard:
    """Writes scalars to DIR/tensorboard, or does nothing; use as a context manager.

    Of several processes the first one writes.

    Raises:
      UserError: `enabled`, but the extra is not installed.
    """

    def __init__(self, directory: epath.Path, enabled: bool):
        self._writer: Any = None
        if not (enabled and is_first()):
            return
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError("training.tensorboard = True: needs `pip install "
                            "'engram_jax[tensorboard]'`") from error
        self._writer = tensorboardX.SummaryWriter(str(directory / "tensorboard"))

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the step's scalars."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
