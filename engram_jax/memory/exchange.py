"""Row ids to rows, and gradients of rows to gradients of the distinct rows behind them.

On one device the exchange is a gather one way and a sorted sum the other way.

Shapes: N ids asked for (with repeats), U = N slots for distinct rows, D columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.memory.layout import TableLayout


class UniqueRows(NamedTuple):
    """Distinct row ids with what belongs to each.

    Attributes:
      ids_U: int32, ascending, in the table (or the device's part of it) that is to be updated;
        unused slots hold an id that no table has.
      grads_UD: float32, the sum over every occurrence of the id; 0 in unused slots.
      used: int32 scalar, how many slots are used.
      global_U: int32, the same rows by their ids in the whole table, whatever the mesh.
    """

    ids_U: jax.Array
    grads_UD: jax.Array
    used: jax.Array
    global_U: jax.Array


UNUSED = jnp.iinfo(jnp.int32).max


def lookup(layout: TableLayout, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows for `ids` (int32, any shape): ids.shape + (D,), in the table's dtype."""
    return layout.gather(table, ids)


def combine(ids_N: jax.Array, grads_ND: jax.Array) -> UniqueRows:
    """Sum the gradients of equal ids, in float32 and always in the same order.

    The ids are sorted (stably), so a distinct id owns one run of occurrences, and a run is summed
    from its first to its last.
    """
    size = ids_N.size
    sorted_N, order_N = jax.lax.sort_key_val(ids_N, jnp.arange(size, dtype=jnp.int32))
    first_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    slot_N = jnp.cumsum(first_N, dtype=jnp.int32) - 1
    grads_UD = jax.ops.segment_sum(
        grads_ND[order_N].astype(jnp.float32), slot_N, num_segments=size, indices_are_sorted=True)
    ids_U = jnp.full(size, UNUSED, jnp.int32).at[slot_N].set(sorted_N, indices_are_sorted=True)
    return UniqueRows(ids_U=ids_U, grads_UD=grads_UD, used=slot_N[-1] + 1, global_U=ids_U)
