"""What the verbs of a memory take and give: its tables, a look-up, and combined gradients.

Shapes: B batch, T time, H rows of a token, C columns of a row, S shards, R rows of a shard,
P devices that share the tables, A look-ups that are combined.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.tables.exchange import Route, RowGradients


def _pytree(*fields: str) -> Callable[[type], type]:
    return functools.partial(jax.tree_util.register_dataclass, data_fields=fields, meta_fields=())


@_pytree("values", "moments", "updates", "made_for")
@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables of a memory and what their optimizer remembers, as a checkpoint holds them.

    Attributes:
      values: for each table, by the name of its site, [S, R, C] as `tables.rounding` stores it.
      moments: for each table the row optimizer's state.
      updates: int32 scalar, how many updates were made; skipped ones do not count.
      made_for: for each table how many rows it has, int32 scalar, under a name that tells what its
        rows mean: site, dtype, and a digest of hash and vocabulary. In the name, so that tables of
        another memory have another structure, which Orbax refuses and `Memory` under jit, too.
    """

    values: dict[str, jax.Array]
    moments: dict[str, Any]
    updates: jax.Array
    made_for: dict[str, jax.Array]


@_pytree("rows", "ids", "routes", "counts")
@dataclasses.dataclass(frozen=True)
class Lookup:
    """The rows of a batch, and the way back to their tables.

    Attributes:
      rows: for each layer of the config, by its number, [B, T, H, C]: the input of the network.
      ids: for each table the row ids, int32 [B, T, H]; -1 where there is no row.
      routes: for each table the way that the rows took, [P, ...].
      counts: for each device what it took, int32 [P] each: tokens that the vocabulary does not
        have (`outside`), distinct rows, rows after the first round, rounds.
    """

    rows: dict[int, jax.Array]
    ids: dict[str, jax.Array]
    routes: dict[str, Route]
    counts: dict[str, jax.Array]

    @property
    def outside(self) -> jax.Array:
        """How many tokens the vocabulary does not have, int32; n-grams with one read zeros."""
        return jnp.sum(self.counts["outside"])

    @property
    def unique(self) -> jax.Array:
        """How many distinct rows the devices asked for, int32, summed over devices and tables."""
        return jnp.sum(self.counts["unique"])

    @property
    def overflow(self) -> jax.Array:
        """How many distinct rows came after the first round, int32; the rest is `capacity`'s."""
        return jnp.sum(self.counts["overflow"])

    @property
    def rounds(self) -> jax.Array:
        """How many rounds the exchange took, int32, for the table that took most."""
        return jnp.max(self.counts["rounds"])


@_pytree("gradients", "squares", "touches")
@dataclasses.dataclass(frozen=True)
class Combined:
    """Gradients of distinct rows, summed over a batch, on their way to the owners of the rows.

    Attributes:
      gradients: for each table, [P, ...].
      squares: float32 [P], the squares of the gradients of the rows that each device owns, summed.
      touches: int32 [P], how many rows of each device have a gradient.
    """

    gradients: dict[str, RowGradients]
    squares: jax.Array
    touches: jax.Array

    @property
    def square(self) -> jax.Array:
        """The squared norm of the gradient of all tables, float32: what clipping adds to the rest.

        It is that of the dense gradient, in which a row counts once however often it was read.
        """
        return jnp.sum(self.squares)

    @property
    def touched(self) -> jax.Array:
        """How many distinct rows have a gradient, int32."""
        return jnp.sum(self.touches)


def in_one(lookup: Any, row_grads: Any) -> tuple[Lookup, Mapping[int, Any]]:
    """The look-ups of several parts stacked, as `jax.lax.scan` does it; one as it is."""
    if isinstance(lookup, Lookup):
        _check_row_grads(lookup, row_grads)
        return lookup, row_grads
    require(isinstance(lookup, list | tuple), "lookup", type(lookup).__name__,
            "must be what Memory.lookup gave, or a list of such")
    require(isinstance(row_grads, list | tuple), "row_grads", type(row_grads).__name__,
            "must be a list, as the look-ups are")
    require(len(lookup) == len(row_grads) > 0, "row_grads", len(row_grads),
            f"must be as many as the look-ups, which are {len(lookup)}")
    for one, grads in zip(lookup, row_grads, strict=True):
        require(isinstance(one, Lookup), "lookup", type(one).__name__,
                "must be what Memory.lookup gave")
        _check_row_grads(one, grads)

    def stack(*parts: Any) -> Any:
        return jnp.stack(parts)

    return jax.tree.map(stack, *lookup), jax.tree.map(stack, *row_grads)


def _check_row_grads(lookup: Lookup, row_grads: Any) -> None:
    require(isinstance(row_grads, Mapping), "row_grads", type(row_grads).__name__,
            "must be a dict, for each layer the gradient of the look-up's rows")

    def shapes(rows: Mapping[int, Any]) -> dict[int, tuple[int, ...]]:
        return {layer: tuple(np.shape(each)) for layer, each in rows.items()}

    require(shapes(row_grads) == shapes(lookup.rows), "row_grads", shapes(row_grads),
            f"must have the layers and shapes of the look-up's rows, {shapes(lookup.rows)}")


def check_tables(tables: Any, right: Tables) -> None:
    """Refuse (UserError) tables that are not of a memory whose own look like `right`."""
    require(isinstance(tables, Tables), "tables", type(tables).__name__,
            "must be Tables, as Memory.init makes them")

    def same(field: str, of: Callable[[Any], Any]) -> None:
        here, there = of(getattr(tables, field)), of(getattr(right, field))
        require(here == there, f"tables.{field}", here,
                f"are of another memory; this one has {there}")

    same("values", lambda values: {name: tuple(each.shape) for name, each in values.items()})
    same("values", lambda values: {name: str(each.dtype) for name, each in values.items()})
    same("made_for", sorted)
    same("moments", lambda moments: {name: type(each).__name__ for name, each in moments.items()})


def check_devices(name: str, counts: jax.Array, devices: int) -> None:
    """Refuse (UserError) what was looked up or combined on another number of devices.

    Args:
      name: of the argument.
      counts: [..., P], one of those that it carries for each device.
      devices: that share the tables.
    """
    require(counts.shape[-1] == devices, name, f"of {counts.shape[-1]} devices",
            f"is of another mesh; {devices} share the tables of this memory")


def as_scalar(name: str, value: Any) -> jax.Array:
    """A setting of an update, float32.

    Raises:
      UserError: it is no number.
    """
    numbers = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    require(numbers and np.ndim(value) == 0, name,
            np.shape(value) if numbers else type(value).__name__, "must be one number")
    return jnp.asarray(value, jnp.float32)


def refuse_shard_map() -> None:
    """Refuse (UserError) to be inside of one: a verb's `jax.shard_map` is its own."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    require(not manual, "axes", tuple(manual), "are those of a jax.shard_map, and a Memory "
            "works on global arrays: call it outside")
