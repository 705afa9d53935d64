"""The three verbs of a memory, look up, combine and update, as one device of a mesh does them.

Everything here runs inside `jax.shard_map` over the axes of the exchanges, on what one device
holds; on one device it needs none. `Memory` wraps it for callers outside, and the training step of
this library is written with it.

Shapes: B batch, T time, H rows of a token, C columns of a row, S shards, R rows of a shard.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.hashing.addressing import Site
from engram_jax.tables import rounding
from engram_jax.tables.exchange import (
    UNUSED,
    Exchange,
    FetchedRows,
    Route,
    RowGradients,
    UniqueRows,
)
from engram_jax.tables.layout import layout_of
from engram_jax.tables.row_optimizers import RowOptimizer

ByTable = Mapping[str, Any]  # something for each table, by the name of its site


class LocalLookup(NamedTuple):
    """What one device has looked up: for each table the route that its ids took, and the rows."""

    routes: dict[str, Route]
    fetched: dict[str, FetchedRows]

    @property
    def rows(self) -> dict[str, jax.Array]:
        """The rows of each table as values, float32 [B, T, H, C]."""
        return {name: rounding.decode(each.rows) for name, each in self.fetched.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalMemory:
    """The tables of a model as one device sees them.

    Attributes:
      exchanges: for each table how its rows travel.
      optimizer: the optimizer of every table.
    """

    exchanges: Mapping[str, Exchange]
    optimizer: RowOptimizer

    @classmethod
    def sized(
        cls,
        sites: Iterable[Site],
        optimizer: RowOptimizer,
        tokens: int,
        *,
        axes: tuple[str, ...] = (),
        devices: int = 1,
        near: int = 0,
        share: float = 1.0,
    ) -> "LocalMemory":
        """The tables of `sites` with room for what a look-up of `tokens` tokens asks for.

        Args:
          sites: whose tables.
          optimizer: the tables' optimizer. One that moves a whole table at once needs every
            gradient in one round, so there is room for all.
          tokens: that one device looks up.
          axes, devices, near: as `Exchange` has them.
          share: rows asked of each peer in a round, over the even share of the ids.
        """
        exchanges = {}
        for site in sites:
            layout, ids = layout_of(site), tokens * site.hash_config.total_heads
            most = min(ids, layout.part(devices).rows)
            capacity = most if optimizer.at_once else min(math.ceil(share * ids / devices), most)
            exchanges[site.name] = Exchange(layout=layout, axes=axes, devices=devices, near=near,
                                            capacity=max(1, capacity))
        return cls(exchanges=exchanges, optimizer=optimizer)

    def lookup(self, tables: ByTable, ids: ByTable) -> LocalLookup:
        """The rows behind `ids`.

        Args:
          tables: this device's part of each table, [S, R, C].
          ids: row ids int32 [B, T, H] for each table that is asked.
        """
        with jax.named_scope("lookup"):
            routes = {name: self.exchanges[name].route(ids[name]) for name in ids}
            return LocalLookup(routes, {
                name: self.exchanges[name].lookup(tables[name], ids[name], route)
                for name, route in routes.items()})

    def combine(self, routes: Mapping[str, Route], row_grads: ByTable) -> dict[str, RowGradients]:
        """Gradients of looked-up rows [B, T, H, C], summed at the owners of the rows."""
        with jax.named_scope("combine"):
            return {name: self.exchanges[name].combine(
                route, row_grads[name].reshape(-1, row_grads[name].shape[-1]))
                for name, route in routes.items()}

    def agrees(self, routes: Mapping[str, Route]) -> dict[str, jax.Array]:
        """For each table whether every row that is asked for reaches its owner, bool."""
        with jax.named_scope("check_exchange"):
            return {name: self.exchanges[name].agrees(route) for name, route in routes.items()}

    def update(
        self,
        tables: ByTable,
        states: ByTable,
        gradients: Mapping[str, RowGradients],
        number: jax.Array,
        learning_rate: jax.Array,
        scale: jax.Array,
        good: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """This device's part of the tables and of their optimizers' states, moved.

        Args:
          tables, states: before; donated, they are changed in place.
          gradients: what `combine` gave.
          number: int32, of this update, counted from 1; skipped ones do not count.
          learning_rate: float32.
          scale: float32, of the gradients.
          good: bool, the same on all devices; where it is false no bit changes.
        """
        moved = {}
        with jax.named_scope("row_update"):
            for name, each in gradients.items():
                here = self.exchanges[name]

                def move(carry: Any, rows: UniqueRows, here: Exchange = here) -> Any:
                    return self.optimizer.update(
                        here.part, *carry, _scaled(rows, scale, good), number, learning_rate,
                        axes=here.axes)

                moved[name] = here.update(each, (tables[name], states[name]), move)
        return ({name: table for name, (table, _) in moved.items()},
                {name: state for name, (_, state) in moved.items()})


def _scaled(rows: UniqueRows, scale: jax.Array, good: jax.Array) -> UniqueRows:
    """Clipped gradients; where the step is bad, no row at all."""
    local_U, global_U = (jnp.where(good, ids_U, UNUSED) for ids_U in (rows.ids_U, rows.global_U))
    return rows._replace(ids_U=local_U, grads_UD=rows.grads_UD * scale, global_U=global_U)
