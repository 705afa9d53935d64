"""The table: layout, combining gradients of rows, row Adam against dense Adam."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.memory import exchange
from engram_jax.memory.exchange import UNUSED
from engram_jax.memory.layout import TableLayout
from engram_jax.memory.row_optimizers import row_adam

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
RATE = 1e-2


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(layout, rows_RD):
    """The table of `layout` that holds `rows_RD`, by plain loops; padding rows hold 777."""
    table = np.full(layout.shape, 777.0, np.float32)
    for row, values in enumerate(rows_RD):
        table[row % layout.shards, row // layout.shards] = values
    return table


def flat(layout, table_SRD):
    """The rows of a table in order, [rows, ...], and its padding rows."""
    swapped = np.asarray(table_SRD).swapaxes(0, 1)
    swapped = swapped.reshape(-1, *swapped.shape[2:])
    return swapped[:layout.rows], swapped[layout.rows:]


# --- Layout ---


@pytest.mark.parametrize("shards", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_shape_has_room_for_every_row_and_less_than_a_shard_of_padding(rows, shards):
    layout = TableLayout(rows=rows, dim=3, shards=shards)
    assert layout.shape == (shards, -(-rows // shards), 3)
    shard, row = layout.locate(jnp.arange(rows))
    places = set(zip(np.asarray(shard).tolist(), np.asarray(row).tolist(), strict=True))
    assert places == {(r % shards, r // shards) for r in range(rows)}


@pytest.mark.parametrize("shards", [1, 7, 64])
def test_gather_gives_rows_and_zeros_outside(shards):
    layout = TableLayout(rows=100, dim=5, shards=shards)
    rows_RD = random(100, 5)
    table = jnp.asarray(filled(layout, rows_RD))
    ids_BT = np.array([[0, 99, 7, 7], [64, 50, 1, 98]], np.int32)
    np.testing.assert_array_equal(layout.gather(table, ids_BT), rows_RD[ids_BT])
    outside = np.array([-1, -7, -100, 100, 101, 127, 128, 2**30, UNUSED, -(2**31)], np.int32)
    np.testing.assert_array_equal(layout.gather(table, outside), np.zeros((10, 5)))


@pytest.mark.parametrize("shards", [1, 7, 64])
def test_put_replaces_rows_and_drops_what_is_outside(shards):
    layout = TableLayout(rows=100, dim=5, shards=shards)
    rows_RD, new_ND = random(100, 5), random(9, 5, seed=1)
    ids_N = np.array([3, 99, -1, 100, 0, UNUSED, 64, -(2**31), 101], np.int32)
    out = layout.put(jnp.asarray(filled(layout, rows_RD)), ids_N, new_ND)
    expected = rows_RD.copy()
    for row, values in zip(ids_N, new_ND, strict=True):
        if 0 <= row < 100:
            expected[row] = values
    kept, padding = flat(layout, out)
    np.testing.assert_array_equal(kept, expected)
    assert (padding == 777).all(), "padding rows are never written"


def test_gather_and_put_of_scalars_a_row():
    layout = TableLayout(rows=10, dim=4, shards=3)
    counts_SR = jnp.zeros(layout.shape[:2], jnp.int32)
    counts_SR = layout.put(counts_SR, jnp.array([4, 9, 12]), jnp.array([40, 90, 120]))
    assert layout.gather(counts_SR, jnp.array([4, 9, 12, 0])).tolist() == [40, 90, 0, 0]
    assert int(counts_SR.sum()) == 130


def test_init():
    layout = TableLayout(rows=1000, dim=20, shards=8)
    table = layout.init(jax.random.key(0), 0.02)
    assert table.shape == layout.shape
    assert table.dtype == jnp.float32
    assert float(jnp.std(table)) == pytest.approx(0.02, rel=0.05)
    assert not layout.init(jax.random.key(0), 0.0).any()


# --- Combining gradients ---


@functools.cache
def combined():
    return jax.jit(exchange.combine)


def check_combine(ids_N, grads_ND):
    unique = combined()(ids_N, grads_ND)
    distinct = np.unique(ids_N)
    expected = np.zeros((ids_N.size, grads_ND.shape[1]))
    np.add.at(expected, np.searchsorted(distinct, ids_N), grads_ND.astype(np.float64))
    assert unique.ids_U.dtype == jnp.int32
    assert unique.grads_UD.dtype == jnp.float32
    assert int(unique.used) == distinct.size
    np.testing.assert_array_equal(unique.ids_U[:distinct.size], distinct)
    assert (np.asarray(unique.ids_U[distinct.size:]) == UNUSED).all()
    np.testing.assert_allclose(unique.grads_UD, expected, rtol=1e-5, atol=1e-5)
    assert not np.asarray(unique.grads_UD[distinct.size:]).any()


@few
@given(st.sampled_from([1, 2, 7, 32]), st.integers(1, 2**31 - 2), st.integers(0, 2**32))
def test_combine_sums_the_gradients_of_equal_ids(size, largest, seed):
    ids_N = np.random.default_rng(seed).integers(0, largest, size).astype(np.int32)
    check_combine(ids_N, random(size, 3, seed=seed))


@pytest.mark.parametrize("ids", [[5] * 7, [3, 1, 4, 0, 9, 2, 6], [2**31 - 2] * 6 + [0], [0] * 7])
def test_combine_of_all_the_same_and_all_different(ids):
    check_combine(np.array(ids, np.int32), random(7, 3))


def test_combine_sums_half_precision_gradients_in_float32():
    """4096 ones and a half: bfloat16 has no number near 4096.5, and stops counting at 256."""
    grads_ND = jnp.ones((4097, 1), jnp.bfloat16).at[-1].set(0.5)
    unique = combined()(jnp.zeros(4097, jnp.int32), grads_ND)
    assert float(unique.grads_UD[0, 0]) == 4096.5


def test_combine_does_not_depend_on_the_order_of_other_ids():
    """A run is summed from its first occurrence to its last: the same bits wherever it lies."""
    values_ND = random(64, 3)
    alone = combined()(np.zeros(64, np.int32), values_ND).grads_UD[0]
    mixed_ids = np.stack([np.zeros(64), np.arange(64) + 5], axis=1).reshape(-1).astype(np.int32)
    mixed_grads = np.stack([values_ND, random(64, 3, seed=1)], axis=1).reshape(-1, 3)
    first, again = (combined()(mixed_ids, mixed_grads) for _ in range(2))
    np.testing.assert_array_equal(first.grads_UD, again.grads_UD)
    np.testing.assert_array_equal(first.grads_UD[0], alone)


# --- Row Adam ---


@functools.cache
def updater(layout):
    return jax.jit(functools.partial(row_adam(**ADAM).update, layout))


def run_row_adam(layout, table_RD, steps):
    """`steps` is a list of (ids, gradients); the table and state after them all."""
    table, state = jnp.asarray(filled(layout, table_RD)), row_adam(**ADAM).init(layout)
    for number, (ids_N, grads_ND) in enumerate(steps, 1):
        unique = combined()(np.asarray(ids_N, np.int32), np.asarray(grads_ND, np.float32))
        table, state = updater(layout)(
            table, state, unique, jnp.int32(number), jnp.float32(RATE))
    return table, state


def run_dense_adam(table_RD, steps):
    transform = optax.adam(RATE, **ADAM)
    table = jnp.asarray(table_RD)
    state = transform.init(table)
    for ids_N, grads_ND in steps:
        updates, state = transform.update(
            jnp.zeros_like(table).at[np.asarray(ids_N)].add(grads_ND), state)
        table = optax.apply_updates(table, updates)
    return np.asarray(table), state[0]


LAYOUT = TableLayout(rows=20, dim=4, shards=7)


def test_row_adam_is_adam_where_every_row_is_touched():
    table_RD = random(20, 4)
    steps = [(np.random.default_rng(i).permutation(20), random(20, 4, seed=i)) for i in range(6)]
    table, _ = run_row_adam(LAYOUT, table_RD, steps)
    expected, _ = run_dense_adam(table_RD, steps)
    rows_RD, padding = flat(LAYOUT, table)
    np.testing.assert_allclose(rows_RD, expected, rtol=0, atol=1e-6)
    assert (padding == 777).all()


def sparse_steps():
    """Eight steps of six ids with repeats, among rows 0..14; some rows rest for long."""
    random_ids = [np.random.default_rng(i).integers(0, 15, 6) for i in range(8)]
    return [(ids, random(6, 4, seed=i)) for i, ids in enumerate(random_ids)]


def test_moments_catch_up_with_dense_adam():
    """After a touch a row's moments equal dense Adam's, however long it rested before."""
    steps = sparse_steps()
    _, state = run_row_adam(LAYOUT, random(20, 4), steps)
    _, dense = run_dense_adam(random(20, 4), steps)
    (m, _), (v, _) = flat(LAYOUT, state.m_SRD), flat(LAYOUT, state.v_SRD)
    touched, _ = flat(LAYOUT, state.touched_SR)
    rested = len(steps) - touched[:, None]
    assert {0, 1} < set(rested[:15, 0].tolist()), "the test needs rows that rested"
    np.testing.assert_allclose(m * ADAM["b1"] ** rested, dense.mu, rtol=0, atol=1e-6)
    np.testing.assert_allclose(v * ADAM["b2"] ** rested, dense.nu, rtol=0, atol=1e-6)
    last = {int(row): number for number, (ids, _) in enumerate(steps, 1) for row in ids}
    assert touched.tolist() == [last.get(row, 0) for row in range(20)]


def test_a_row_that_is_not_touched_keeps_its_bits():
    table_RD = random(20, 4)
    steps = sparse_steps()
    before, state_before = run_row_adam(LAYOUT, table_RD, steps[:7])
    after, state_after = run_row_adam(LAYOUT, table_RD, steps)
    rest = np.setdiff1d(np.arange(20), steps[7][0])
    for old, new in zip(jax.tree.leaves((before, state_before)),
                        jax.tree.leaves((after, state_after)), strict=True):
        (old_rows, old_pad), (new_rows, new_pad) = flat(LAYOUT, old), flat(LAYOUT, new)
        np.testing.assert_array_equal(old_rows[rest], new_rows[rest])
        np.testing.assert_array_equal(old_pad, new_pad)
        moved = steps[7][0]
        assert (old_rows[moved] != new_rows[moved]).any(), "the touched rows do move"


def test_ids_out_of_range_change_nothing():
    """So a bad step is skipped: its ids are all set to UNUSED."""
    table, state = run_row_adam(LAYOUT, random(20, 4), sparse_steps())
    unique = combined()(np.array([-3, 20, 21, UNUSED - 1, UNUSED, -(2**31)], np.int32),
                        np.full((6, 4), np.nan, np.float32))
    skipped = updater(LAYOUT)(table, state, unique, jnp.int32(9), jnp.float32(RATE))
    for old, new in zip(jax.tree.leaves((table, state)), jax.tree.leaves(skipped), strict=True):
        np.testing.assert_array_equal(old, new)


def memory_of_step(rows):
    """XLA's account of a jitted look-up, backward and update with everything donated."""
    layout, optimizer = TableLayout(rows=rows, dim=8, shards=16), row_adam(**ADAM)

    def step(table, state, ids_N, target_ND, number):
        read = layout.gather(table, ids_N)
        grads = jax.grad(lambda rows_ND: jnp.sum((rows_ND - target_ND) ** 2))(read)
        unique = exchange.combine(ids_N, grads)
        return optimizer.update(layout, table, state, unique, number, jnp.float32(RATE))

    table = jax.ShapeDtypeStruct(layout.shape, jnp.float32)
    state = jax.eval_shape(lambda: optimizer.init(layout))
    arguments = (jax.ShapeDtypeStruct((32,), jnp.int32), jax.ShapeDtypeStruct((32, 8), jnp.float32),
                 jax.ShapeDtypeStruct((), jnp.int32))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, *arguments).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((table, state)))
    return compiled.memory_analysis(), held


def test_tables_are_updated_in_place():
    """Nothing of the table's size is made beside the donated table and its moments."""
    (small, _), (large, held) = memory_of_step(10_000), memory_of_step(1_000_000)
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < 100_000
    assert large.alias_size_in_bytes >= held
    assert large.output_size_in_bytes - large.alias_size_in_bytes < 1000
