"""The shape of a table: `[shards, rows, dim]`, row r at (r mod shards, r div shards).

Shapes: S shards, R rows of a shard, D columns, N row ids.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableLayout:
    """One table of `rows` rows and `dim` columns, spread over `shards` virtual shards.

    Neighbouring rows lie on different shards, so the rows of one head, and with them the hot
    n-grams, spread evenly over however many devices hold the shards. The last rows of some shards
    are padding that no id points at.
    """

    rows: int
    dim: int
    shards: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, R, D)."""
        return (self.shards, -(-self.rows // self.shards), self.dim)

    def part(self, devices: int) -> "TableLayout":
        """The layout of what one of `devices` devices holds: a table of its own.

        Row r of a part lies at (r mod its shards, r div its shards); its rows include padding.
        """
        assert self.shards % devices == 0
        shards = self.shards // devices
        rows = self.rows if devices == 1 else shards * self.shape[1]
        return TableLayout(rows=rows, dim=self.dim, shards=shards)

    def locate(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Shard and row within it of each id; ids that are not below `rows` land out of range."""
        inside = (ids >= 0) & (ids < self.rows)
        shard = jnp.where(inside, ids % self.shards, self.shards)
        return shard, ids // self.shards

    def init(self, key: jax.Array, std: float) -> jax.Array:
        """A float32 table with normal entries of standard deviation `std` (0 gives zeros)."""
        if std == 0:
            return jnp.zeros(self.shape, jnp.float32)
        return std * jax.random.normal(key, self.shape, jnp.float32)

    def gather(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows of `table` [S, R, ...] at `ids` (any shape): ids.shape + table.shape[2:].

        An id out of range gives zeros.
        """
        shard, row = self.locate(ids)
        return table.at[shard, row].get(mode="fill", fill_value=0)

    def put(self, table: jax.Array, ids_N: jax.Array, rows_ND: jax.Array) -> jax.Array:
        """`table` with its rows at distinct `ids_N` replaced; ids out of range are dropped.

        In place when `table` is donated and not read afterwards.
        """
        shard, row = self.locate(ids_N)
        return table.at[shard, row].set(rows_ND, mode="drop", unique_indices=True)
