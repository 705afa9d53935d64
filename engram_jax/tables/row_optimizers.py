"""Optimizers of tables, from the gradients of the distinct rows that a step has read.

Row Adam, RMSProp and Adagrad change those rows only; dense Adam and balanced momentum pass over the
whole table, but none makes a gradient of its size. A table is float32 or, as uint16 bits,
bfloat16 with stochastic rounding (`rounding`); all arithmetic and all moments are float32.

Inside `jax.shard_map`, a device gives its part of the table and state, and the rows that lie in it.

Shapes: S shards, R rows of a shard, D columns, U slots for distinct rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import OptimizerConfig, require
from engram_jax.tables import balance, rounding
from engram_jax.tables.balance import Scaled
from engram_jax.tables.exchange import UniqueRows
from engram_jax.tables.layout import TableLayout


class RowOptimizer(NamedTuple):
    """An optimizer of one table, in the manner of an optax transform.

    A step in which no device has an id in range (all are `exchange.UNUSED`) is a skipped step: it
    changes no bit of table or state, whatever the gradients hold.

    Attributes:
      init: (layout) -> state, of the whole table. Its arrays have the table's shards first.
      update: (layout, table, state, unique_rows, number, learning_rate, axes=()) -> (table, state),
        where `number` int32 counts the updates from 1 (skipped steps are none, so that moments
        are corrected for what they hold), and `axes` are, inside `jax.shard_map`, the mesh axes
        that divide the table's shards. Ids out of range are dropped. Donate the table and the
        state: then they are updated in place.
      at_once: it passes over the whole table, so a step must give it all rows in one update.
    """

    init: Callable[[TableLayout], Any]
    update: Callable[..., tuple[jax.Array, Any]]
    at_once: bool = False


def row_optimizer(config: OptimizerConfig) -> RowOptimizer:
    """The optimizer that `config.table_optimizer` names."""
    b1, b2, eps = config.table_b1, config.table_b2, config.table_eps
    return {
        "row_adam": lambda: row_adam(b1=b1, b2=b2, eps=eps),
        "dense_adam": lambda: dense_adam(b1=b1, b2=b2, eps=eps),
        "row_rmsprop": lambda: row_rmsprop(b2=b2, eps=eps),
        "row_adagrad": lambda: row_adagrad(eps=eps),
        "balanced_momentum": lambda: balanced_momentum(momentum=config.table_momentum),
    }[config.table_optimizer]()


def state_bytes(optimizer: RowOptimizer, dim: int) -> int:
    """Bytes of the optimizer's state for each row of `dim` columns, beside the table's own."""
    state = jax.eval_shape(lambda: optimizer.init(TableLayout(rows=1, dim=dim, shards=1)))
    per_row = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in per_row)


# --- Touched rows alone ---


class RowAdamState(NamedTuple):
    """m_SRD and v_SRD float32: the moments; touched_SR int32: the number of the
    last update that touched the row."""

    m_SRD: jax.Array
    v_SRD: jax.Array
    touched_SR: jax.Array


def row_adam(*, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8) -> RowOptimizer:
    """Adam on the touched rows alone.

    A row's moments miss the decay of the steps in which it was not touched; they catch up at the
    next touch (m <- b1**gap m), so that they equal dense Adam's. What differs from dense Adam:
    a row that is not touched does not move.
    """

    def init(layout: TableLayout) -> RowAdamState:
        return RowAdamState(
            m_SRD=jnp.zeros(layout.shape, jnp.float32),
            v_SRD=jnp.zeros(layout.shape, jnp.float32),
            touched_SR=jnp.zeros(layout.shape[:2], jnp.int32),
        )

    def update(
        layout: TableLayout,
        table_SRD: jax.Array,
        state: RowAdamState,
        rows: UniqueRows,
        number: jax.Array,
        learning_rate: jax.Array,
        axes: tuple[str, ...] = (),
    ) -> tuple[jax.Array, RowAdamState]:
        rows = _in_layout(layout, rows, number)
        ids_U, grads_UD = rows.ids_U, rows.grads_UD
        touched_U = layout.gather(state.touched_SR, ids_U)
        gap_U1 = (number - touched_U).astype(jnp.float32)[:, None]
        m_UD = layout.gather(state.m_SRD, ids_U) * b1**gap_U1 + (1 - b1) * grads_UD
        v_UD = layout.gather(state.v_SRD, ids_U) * b2**gap_U1 + (1 - b2) * grads_UD**2
        direction_UD = _adam_direction(m_UD, v_UD, number, b1, b2, eps)
        # The maximum is always `number`, but makes the write wait for the read, as it does for the
        # moments and the table; otherwise XLA copies all of touched_SR.
        now_U = jnp.maximum(touched_U, number)
        return _moved(layout, table_SRD, rows, -learning_rate * direction_UD, number), RowAdamState(
            m_SRD=layout.put(state.m_SRD, ids_U, m_UD),
            v_SRD=layout.put(state.v_SRD, ids_U, v_UD),
            touched_SR=layout.put(state.touched_SR, ids_U, now_U),
        )

    return RowOptimizer(init, update)


class RowRmsPropState(NamedTuple):
    """v_SR float32: mean squares of a row's gradient; touches_SR int32: how many it is made of."""

    v_SR: jax.Array
    touches_SR: jax.Array


def row_rmsprop(*, b2: float = 0.95, eps: float = 1e-8) -> RowOptimizer:
    """RMSProp with one second moment a row: the mean of its gradient's squares.

    The average runs over the row's touches, not over steps, and its bias is corrected by their
    number: v <- b2 v + (1 - b2) mean(g**2), row -= rate * g / (sqrt(v / (1 - b2**touches)) + eps).
    Decay over the steps between two touches, as Adam has it, would shrink v but, without a first
    moment, not the step: a row that rested would move 1/sqrt(1 - b2) too far.
    """

    def init(layout: TableLayout) -> RowRmsPropState:
        return RowRmsPropState(
            v_SR=jnp.zeros(layout.shape[:2], jnp.float32),
            touches_SR=jnp.zeros(layout.shape[:2], jnp.int32),
        )

    def update(
        layout: TableLayout,
        table_SRD: jax.Array,
        state: RowRmsPropState,
        rows: UniqueRows,
        number: jax.Array,
        learning_rate: jax.Array,
        axes: tuple[str, ...] = (),
    ) -> tuple[jax.Array, RowRmsPropState]:
        rows = _in_layout(layout, rows, number)
        touches_U = layout.gather(state.touches_SR, rows.ids_U) + 1
        v_U = b2 * layout.gather(state.v_SR, rows.ids_U) + (1 - b2) * _mean_square(rows)
        root_U = jnp.sqrt(v_U / (1 - b2 ** touches_U.astype(jnp.float32))) + eps
        change_UD = -learning_rate * rows.grads_UD / root_U[:, None]
        return _moved(layout, table_SRD, rows, change_UD, number), RowRmsPropState(
            v_SR=layout.put(state.v_SR, rows.ids_U, v_U),
            touches_SR=layout.put(state.touches_SR, rows.ids_U, touches_U),
        )

    return RowOptimizer(init, update)


class RowAdagradState(NamedTuple):
    """v_SR float32: the sum of the mean squares of a row's gradients."""

    v_SR: jax.Array


def row_adagrad(*, eps: float = 1e-8) -> RowOptimizer:
    """Adagrad with one accumulator a row.

    v <- v + mean(g**2), row -= rate * g / (sqrt(v) + eps); as FBGEMM's row-wise Adagrad.
    """

    def init(layout: TableLayout) -> RowAdagradState:
        return RowAdagradState(v_SR=jnp.zeros(layout.shape[:2], jnp.float32))

    def update(
        layout: TableLayout,
        table_SRD: jax.Array,
        state: RowAdagradState,
        rows: UniqueRows,
        number: jax.Array,
        learning_rate: jax.Array,
        axes: tuple[str, ...] = (),
    ) -> tuple[jax.Array, RowAdagradState]:
        rows = _in_layout(layout, rows, number)
        v_U = layout.gather(state.v_SR, rows.ids_U) + _mean_square(rows)
        change_UD = -learning_rate * rows.grads_UD / (jnp.sqrt(v_U) + eps)[:, None]
        table_SRD = _moved(layout, table_SRD, rows, change_UD, number)
        return table_SRD, RowAdagradState(v_SR=layout.put(state.v_SR, rows.ids_U, v_U))

    return RowOptimizer(init, update)


# --- The whole table ---


class DenseAdamState(NamedTuple):
    """m_SRD and v_SRD float32: the moments."""

    m_SRD: jax.Array
    v_SRD: jax.Array


def dense_adam(*, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8) -> RowOptimizer:
    """Adam as the paper has it: every row moves in every step by its decaying moments.

    The same numbers as `optax.adam` on the dense gradient, which is never made: the moments decay
    everywhere, and what the gradient adds is scattered into them.
    """

    def init(layout: TableLayout) -> DenseAdamState:
        return DenseAdamState(*(jnp.zeros(layout.shape, jnp.float32) for _ in range(2)))

    def update(
        layout: TableLayout,
        table_SRD: jax.Array,
        state: DenseAdamState,
        rows: UniqueRows,
        number: jax.Array,
        learning_rate: jax.Array,
        axes: tuple[str, ...] = (),
    ) -> tuple[jax.Array, DenseAdamState]:
        rows = _in_layout(layout, rows, number)
        active = _active(layout, rows, axes)
        m_SRD = layout.add(
            state.m_SRD * jnp.where(active, b1, 1.0), rows.ids_U, (1 - b1) * rows.grads_UD)
        v_SRD = layout.add(
            state.v_SRD * jnp.where(active, b2, 1.0), rows.ids_U, (1 - b2) * rows.grads_UD**2)
        change_SRD = -learning_rate * _adam_direction(m_SRD, v_SRD, number, b1, b2, eps)
        table_SRD = _all_moved(layout, table_SRD, change_SRD, number, active, axes)
        return table_SRD, DenseAdamState(m_SRD, v_SRD)

    return RowOptimizer(init, update, at_once=True)


class BalancedState(NamedTuple):
    """m_SRD float32: the momentum; rows_S int32: how many rows of a shard are not padding."""

    m_SRD: jax.Array
    rows_S: jax.Array


def balanced_momentum(
    *,
    momentum: float = 0.95,
    rms: float = 0.18,
    least: float = 1e-3,
    rounds: int = 11,
    eps: float = 1e-20,
) -> RowOptimizer:
    """DeepSeek-V4.1's optimizer of tables (docs/spec.md (21)).

    M <- b M + (1 - b) G; U = b M + (1 - b) G. Rows of U whose norm is at most `least` of the mean
    norm become 0, then rows and columns of [rows, D] are divided by their norms in turn, `rounds`
    times, rows first; table -= rms * rate * sqrt(D) * U. Means and norms are the whole table's.

    U is never made: at rows that are not touched it is b M, at the others it is kept apart, and
    balancing yields factors (`balance`). So touched rows have the factor 0 in M.
    """

    def init(layout: TableLayout) -> BalancedState:
        shards, _, _ = layout.shape
        rows_S = (layout.rows + shards - 1 - jnp.arange(shards, dtype=jnp.int32)) // shards
        return BalancedState(jnp.zeros(layout.shape, jnp.float32), rows_S)

    def update(
        layout: TableLayout,
        table_SRD: jax.Array,
        state: BalancedState,
        rows: UniqueRows,
        number: jax.Array,
        learning_rate: jax.Array,
        axes: tuple[str, ...] = (),
    ) -> tuple[jax.Array, BalancedState]:
        rows = _in_layout(layout, rows, number)
        active, touched_U = _active(layout, rows, axes), layout.holds(rows.ids_U)
        grads_UD = (1 - momentum) * jnp.where(touched_U[:, None], rows.grads_UD, 0)
        m_SRD = layout.add(state.m_SRD * jnp.where(active, momentum, 1.0), rows.ids_U, grads_UD)
        u_UD = momentum * layout.gather(m_SRD, rows.ids_U) + grads_UD
        b_SR = jnp.full(layout.shape[:2], momentum, jnp.float32)
        scale_SR = layout.put(b_SR, rows.ids_U, jnp.zeros(touched_U.shape, jnp.float32))
        u = Scaled((m_SRD, u_UD), (scale_SR, touched_U.astype(jnp.float32)), jnp.ones(layout.dim))
        total = balance.psum(jnp.sum(state.rows_S), axes)
        u = balance.without_faint_rows(u, total, least, axes)
        u = balance.balanced(u, rounds, eps, axes)
        rate = -rms * learning_rate * layout.dim**0.5
        table_SRD = _all_moved(layout, table_SRD, rate * u.part(0), number, active, axes)
        table_SRD = _moved(layout, table_SRD, rows, rate * u.part(1), number)
        return table_SRD, BalancedState(m_SRD, state.rows_S)

    return RowOptimizer(init, update, at_once=True)


# --- What they share ---


def _in_layout(layout: TableLayout, rows: UniqueRows, number: Any) -> UniqueRows:
    """The rows by the ids that `layout` counts: local rows in a device's part, else row ids.

    Raises:
      UserError: the number of the update is seen to be below 1.
    """
    if not isinstance(number, jax.core.Tracer):
        require(int(number) >= 1, "number", int(number), "must count the updates from 1")
    return rows if layout.ordered else rows._replace(ids_U=rows.global_U)


def _adam_direction(
    m: jax.Array, v: jax.Array, number: jax.Array, b1: float, b2: float, eps: float
) -> jax.Array:
    t = jnp.maximum(number, 1).astype(jnp.float32)  # the number 0 would give NaN
    return (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)


def _mean_square(rows: UniqueRows) -> jax.Array:
    return jnp.mean(rows.grads_UD**2, axis=-1)


def _active(layout: TableLayout, rows: UniqueRows, axes: tuple[str, ...]) -> jax.Array:
    """Whether any device has a row to change; if none has, the step is a skipped one."""
    return balance.psum(jnp.sum(layout.holds(rows.ids_U)), axes) > 0


def _moved(
    layout: TableLayout,
    table_SRD: jax.Array,
    rows: UniqueRows,
    change_UD: jax.Array,
    number: jax.Array,
) -> jax.Array:
    """The table with `change_UD` added to its touched rows."""
    new_UD = rounding.decode(layout.gather(table_SRD, rows.ids_U)) + change_UD
    stored_UD = rounding.encode(new_UD, table_SRD.dtype, rows.global_U, number)
    return layout.put(table_SRD, rows.ids_U, stored_UD)


def _all_moved(
    layout: TableLayout,
    table_SRD: jax.Array,
    change_SRD: jax.Array,
    number: jax.Array,
    active: jax.Array,
    axes: tuple[str, ...],
) -> jax.Array:
    """The table with `change_SRD` added, if the step is `active`.

    Every entry is written from itself alone, so this is in place, too.
    """
    new_SRD = rounding.decode(table_SRD) + change_SRD
    stored_SRD = rounding.encode(new_SRD, table_SRD.dtype, layout.row_ids(axes), number)
    return jnp.where(active, stored_SRD, table_SRD)
