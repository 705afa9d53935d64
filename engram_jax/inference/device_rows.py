"""Rows of tables that lie on the device, and what the engine asks of any source of rows.

Shapes: B sequences, T tokens, P tokens of history, H rows of a token, C columns of a row.
"""

from typing import Protocol

import jax
import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.hashing.addressing import Addressing
from engram_jax.inference.caches import Place, of_slot
from engram_jax.inference.stages import advance
from engram_jax.offload.prefetch import Answer, Chunk, Counters
from engram_jax.tables.layout import gather_rows


class Rows(Protocol):
    """A source of rows.

    Attributes:
      on_host: it needs the tokens on the host.
    """

    on_host: bool

    @property
    def counters(self) -> Counters:
        """What it has done so far."""

    def on_device(
        self, tokens_BT: jax.Array, count_B: np.ndarray, place: Place, slot: np.ndarray | None
    ) -> Answer:
        """The rows of tokens that are on the device (`on_host` is false)."""

    def ask(self, chunk: Chunk) -> Answer:
        """Begin to fetch the rows of tokens that are on the host (`on_host` is true)."""

    def close(self) -> None:
        """Stop what runs."""


class DeviceRows:
    """Tables on the device.

    Args:
      model: of the tables.
      addressing: tokens to rows.
      tables: for each site [S, R, D], as training has them.
      end_id: as in `stages.advance`.

    Raises:
      UserError: a control, which cannot serve.
    """

    on_host = False

    def __init__(self, model: ModelConfig, addressing: Addressing, tables: dict[str, jax.Array],
                 end_id: int | None = None):
        addressing.check_serves()
        self._tables = tables

        @jax.jit
        def gather(
            tables: dict[str, jax.Array], tokens_BT: jax.Array, count_B: jax.Array, place: Place,
            slot: jax.Array | None,
        ) -> dict[str, jax.Array]:
            here = of_slot(place, slot, 0)
            context, _ = advance(here, tokens_BT, count_B, end_id)
            positions_BT = None if end_id is None else context.positions_BT - context.first_BT
            return gather_rows(
                model, tables, addressing.ids(tokens_BT, positions_BT, here.history_BH))

        self._gather = gather

    @property
    def counters(self) -> Counters:
        return Counters()

    def on_device(
        self, tokens_BT: jax.Array, count_B: np.ndarray, place: Place, slot: np.ndarray | None
    ) -> Answer:
        return self._gather(self._tables, tokens_BT, count_B, place, slot).__getitem__

    def ask(self, chunk: Chunk) -> Answer:
        raise AssertionError("tables on the device take tokens on the device")

    def close(self) -> None:
        pass
