"""The shape of a table: `[shards, rows, dim]`, row r at (r mod shards, r div shards).

Shapes: S shards, R rows of a shard, D columns, N row ids.
"""

import dataclasses

import jax
import jax.numpy as jnp

from engram_jax.config import EngramConfig, ModelConfig, require
from engram_jax.hashing.addressing import Site, sites
from engram_jax.tables import rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableLayout:
    """One table of `rows` rows and `dim` columns, spread over `shards` virtual shards.

    Neighbouring rows lie on different shards, so the rows of one head, and with them the hot
    n-grams, spread evenly over however many devices hold the shards. The last rows of some shards
    are padding that no id points at.

    Attributes:
      rows, dim, shards: the sizes.
      ordered: ids are keys, counted shard after shard, padding included, and come ascending, as
        local rows of a device's part do: writing them takes no sort.
    """

    rows: int
    dim: int
    shards: int
    ordered: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, R, D)."""
        return (self.shards, -(-self.rows // self.shards), self.dim)

    def key(self, ids: jax.Array) -> jax.Array:
        """The keys of row ids: rows counted shard after shard, padding included."""
        return ids % self.shards * self.shape[1] + ids // self.shards

    def row_id(self, keys: jax.Array) -> jax.Array:
        """The row ids of keys, the inverse of `key`."""
        return keys % self.shape[1] * self.shards + keys // self.shape[1]

    def check_divides(self, devices: int, field: str = "shards") -> None:
        """Refuse a table that cannot be spread over `devices` devices (UserError).

        Args:
          devices: how many.
          field: which setting to name.
        """
        require(self.shards % devices == 0, field, self.shards,
                f"does not divide among {devices} devices; set a multiple of {devices}")
        keys = self.shards * self.shape[1]
        require(keys < 2**31, field, self.shards,
                f"pads the table's {self.rows} rows to {keys}, and a table must have less than "
                "2**31: set fewer shards, or fewer rows")

    def part(self, devices: int) -> "TableLayout":
        """The layout of what one of `devices` devices holds: an ordered table of its own."""
        self.check_divides(devices)
        shards = self.shards // devices
        return TableLayout(
            rows=shards * self.shape[1], dim=self.dim, shards=shards, ordered=True)

    def holds(self, ids: jax.Array) -> jax.Array:
        """Which ids are those of rows, bool."""
        return (ids >= 0) & (ids < self.rows)

    def locate(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Shard and row within it of each id; ids that are not below `rows` land out of range."""
        shard, row = ids % self.shards, ids // self.shards
        if self.ordered:
            shard, row = ids // self.shape[1], ids % self.shape[1]
        return jnp.where(self.holds(ids), shard, self.shards), row

    def row_ids(self, axes: tuple[str, ...] = ()) -> jax.Array:
        """The row id of each row, uint32 [S, R]; padding has ids from the number of rows on.

        In a device's part of a table, whose shards `axes` of the mesh divide (inside
        `jax.shard_map`), the ids are those of the whole table.
        """
        shard_S = jnp.arange(self.shards, dtype=jnp.uint32)
        row_R = jnp.arange(self.shape[1], dtype=jnp.uint32) * jnp.uint32(self.shards)
        if axes:
            shard_S += jnp.uint32(jax.lax.axis_index(axes) * self.shards)
            row_R *= jnp.uint32(jax.lax.axis_size(axes))
        return shard_S[:, None] + row_R[None, :]

    def init(self, key: jax.Array, std: float, dtype: str = "float32") -> jax.Array:
        """A table with normal entries of standard deviation `std` (0 gives zeros).

        Args:
          dtype: "float32" or "bfloat16", the latter stored as `rounding` says.
        """
        stored = rounding.storage(dtype)
        if std == 0:
            return jnp.zeros(self.shape, stored)
        return rounding.nearest(std * jax.random.normal(key, self.shape, jnp.float32), stored)

    def _check(self, table: jax.Array) -> None:
        right = self.shape[:2]
        require(table.shape[:2] == right, "table.shape", table.shape,
                f"must begin with {right}, as this layout does; a device's part has "
                "`TableLayout.part`")

    def gather(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows of `table` [S, R, ...] at `ids` (any shape): ids.shape + table.shape[2:].

        An id out of range gives zeros.
        """
        self._check(table)
        shard, row = self.locate(ids)
        return table.at[shard, row].get(mode="fill", fill_value=0)

    def put(self, table: jax.Array, ids_N: jax.Array, rows_ND: jax.Array) -> jax.Array:
        """`table` with its rows at distinct `ids_N` replaced; ids out of range are dropped.

        In place when `table` is donated and not read afterwards.
        """
        self._check(table)
        shard, row = self.locate(ids_N)
        return table.at[shard, row].set(
            _made_first(rows_ND), mode="drop", unique_indices=True, indices_are_sorted=self.ordered)

    def add(self, table: jax.Array, ids_N: jax.Array, rows_ND: jax.Array) -> jax.Array:
        """`table` with `rows_ND` added to its rows at distinct `ids_N`; otherwise as `put`."""
        self._check(table)
        shard, row = self.locate(ids_N)
        return table.at[shard, row].add(
            rows_ND, mode="drop", unique_indices=True, indices_are_sorted=self.ordered)


def layout_of(site: Site) -> TableLayout:
    """The layout of a site's table."""
    return TableLayout(rows=site.rows, dim=site.dim, shards=site.hash_config.shards)


def gather_rows(
    config: ModelConfig | EngramConfig, tables: dict[str, jax.Array], ids: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """For each site its rows float32 [B, T, H, C], from tables that lie whole on one device."""
    return {site.name: rounding.decode(layout_of(site).gather(tables[site.name], ids[site.name]))
            for site in sites(config)}


def _made_first(rows_ND: jax.Array) -> jax.Array:
    """The same, on TPUs made before anything that takes it begins.

    Rows to be written are made of the rows that they replace. libtpu fuses reading those with the
    write, which then reads what it overwrites, and copies the whole table first.
    """
    return jax.lax.platform_dependent(
        rows_ND, tpu=jax.lax.optimization_barrier, default=lambda rows_ND: rows_ND)
