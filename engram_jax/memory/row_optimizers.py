"""Optimizers that change only the rows that a step has read.

Shapes: S shards, R rows of a shard, D columns, U slots for distinct rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.memory.exchange import UniqueRows
from engram_jax.memory.layout import TableLayout


class RowOptimizer(NamedTuple):
    """An optimizer of one table, in the manner of an optax transform.

    Attributes:
      init: (layout) -> state.
      update: (layout, table, state, unique_rows, step, learning_rate) -> (table, state), where
        `step` counts from 1. Rows whose id is out of range are left alone.
    """

    init: Callable[[TableLayout], Any]
    update: Callable[..., tuple[jax.Array, Any]]


class RowAdamState(NamedTuple):
    """m_SRD and v_SRD float32: the moments; touched_SR int32: the step of the last touch."""

    m_SRD: jax.Array
    v_SRD: jax.Array
    touched_SR: jax.Array


def row_adam(*, b1: float, b2: float, eps: float) -> RowOptimizer:
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
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, RowAdamState]:
        ids_U, grads_UD = rows.ids_U, rows.grads_UD
        touched_U = layout.gather(state.touched_SR, ids_U)
        gap_U1 = (step - touched_U).astype(jnp.float32)[:, None]
        m_UD = layout.gather(state.m_SRD, ids_U) * b1**gap_U1 + (1 - b1) * grads_UD
        v_UD = layout.gather(state.v_SRD, ids_U) * b2**gap_U1 + (1 - b2) * grads_UD**2
        t = step.astype(jnp.float32)
        step_UD = (m_UD / (1 - b1**t)) / (jnp.sqrt(v_UD / (1 - b2**t)) + eps)
        new_UD = layout.gather(table_SRD, ids_U) - learning_rate * step_UD
        # The maximum is always `step`, but makes the write wait for the read, as it does for the
        # moments and the table; otherwise XLA copies all of touched_SR.
        now_U = jnp.maximum(touched_U, step)
        return layout.put(table_SRD, ids_U, new_UD), RowAdamState(
            m_SRD=layout.put(state.m_SRD, ids_U, m_UD),
            v_SRD=layout.put(state.v_SRD, ids_U, v_UD),
            touched_SR=layout.put(state.touched_SR, ids_U, now_U),
        )

    return RowOptimizer(init, update)
