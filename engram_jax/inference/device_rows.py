"""Rows of tables that lie on the device.

Shapes: B sequences, T tokens, P tokens of history, S = P + T, H rows of a token, C columns.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig, ModelConfig
from engram_jax.hashing.addressing import Addressing
from engram_jax.hashing.ngrams import reach_from_documents
from engram_jax.hashing.token_hash import BEFORE
from engram_jax.offload.source import RowSource, Tokens
from engram_jax.tables.layout import gather_rows


class DeviceRows(RowSource):
    """Brings the rows of tokens from tables that lie on the device, or are split over a mesh.

    Args:
      config: of the tables.
      addressing: tokens to row ids.
      tables: for each site [S, R, C], as training has them.
      end_id: the raw id after which a document begins, where n-grams stop; None lets them cross.

    Raises:
      UserError: as `RowSource`.
    """

    def __init__(self, config: ModelConfig | EngramConfig, addressing: Addressing,
                 tables: dict[str, jax.Array], end_id: int | None = None):
        super().__init__(addressing, end_id)
        self._tables = tables
        self._gather = jax.jit(functools.partial(_gathered, config, addressing, end_id))

    def request(
        self, tokens: Tokens, history: np.ndarray | None = None,
        positions: np.ndarray | None = None, count: np.ndarray | None = None,
    ) -> Mapping[str, jax.Array]:
        """See `RowSource.request`; tokens that are on the device must be known to be right."""
        if not self._tables:
            return {}
        self.check_shapes(tokens, history, positions)
        if isinstance(tokens, np.ndarray):
            self.addressing.check_known(tokens, history)
        rows: dict[str, jax.Array] = self._gather(self._tables, tokens, history, positions)
        return rows

    def close(self) -> None:
        """See `RowSource.close`: there is nothing to close."""


def _gathered(
    config: ModelConfig | EngramConfig, addressing: Addressing, end_id: int | None,
    tables: dict[str, jax.Array], tokens_BT: jax.Array, history_BP: jax.Array | None,
    positions_BT: jax.Array | None,
) -> dict[str, jax.Array]:
    """The rows of each site, float32 [B, T, H, C]."""
    if positions_BT is None and end_id is not None:
        if history_BP is None:
            history_BP = jnp.full((len(tokens_BT), addressing.history_length), BEFORE, jnp.int32)
        before = history_BP.shape[1]
        joined_BS = jnp.concatenate([history_BP, tokens_BT], axis=1)
        first_BS = jnp.pad(joined_BS[:, :-1] == end_id, ((0, 0), (1, 0)))
        positions_BT = reach_from_documents(first_BS[:, before:], first_BS[:, :before]) - 1
    return gather_rows(config, tables, addressing.ids(tokens_BT, positions_BT, history_BP))
