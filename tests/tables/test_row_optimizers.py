"""Optimizers of tables against optax and float64 NumPy; skipped steps, meshes, memory."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tables import filled, flat, random

from engram_jax.config import TABLE_OPTIMIZERS, OptimizerConfig
from engram_jax.costs.slices import slice_of
from engram_jax.tables import exchange, rounding
from engram_jax.tables.exchange import UNUSED, UniqueRows
from engram_jax.tables.layout import TableLayout
from engram_jax.tables.row_optimizers import balanced_momentum, row_optimizer, state_bytes

pytestmark = pytest.mark.usefixtures("compilations")

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
RATE = 1e-2
LAYOUT = TableLayout(rows=20, dim=4, shards=7)
ROW_WISE = ("row_adam", "row_rmsprop", "row_adagrad")
DENSE = ("dense_adam", "balanced_momentum")
DTYPES = ("float32", "bfloat16")


def named(name):
    return row_optimizer(OptimizerConfig(table_optimizer=name))


@functools.cache
def updater(name, layout):
    return jax.jit(functools.partial(named(name).update, layout))


@functools.cache
def combined():
    return jax.jit(exchange.combine)


def combine(ids, grads):
    return combined()(np.asarray(ids, np.int32), np.asarray(grads, np.float32))


def stored(values_RD, dtype="float32"):
    """`values_RD` as a table of `dtype` holds them, rounded to nearest."""
    return np.asarray(rounding.nearest(jnp.asarray(values_RD), rounding.storage(dtype)))


def run(name, table_RD, steps, layout=LAYOUT, first=1, state=None):
    """`steps` is a list of (ids, gradients); the table and state after them all."""
    table, state = jnp.asarray(filled(layout, table_RD)), state or named(name).init(layout)
    for number, (ids, grads) in enumerate(steps, first):
        table, state = updater(name, layout)(
            table, state, combine(ids, grads), jnp.int32(number), jnp.float32(RATE))
    return table, state


def sparse_steps(count=8, rows=15, size=6, dim=4):
    """Steps of ids with repeats, among the first `rows` rows; some rows rest for long."""
    ids = [np.random.default_rng(i).integers(0, rows, size) for i in range(count)]
    return [(ids, random(size, dim, seed=i)) for i, ids in enumerate(ids)]


def assert_same_bits(old, new):
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- float64 NumPy, written from the definitions ---


def reference(name, table_RD, steps):
    """The table [rows, D] after `steps`, by `name`, with dense gradients in float64."""
    table = table_RD.astype(np.float64)
    memory = {"m": np.zeros_like(table), "v": np.zeros_like(table),
              "row_v": np.zeros(len(table)), "touches": np.zeros(len(table))}
    for number, (ids, grads) in enumerate(steps, 1):
        dense = np.zeros_like(table)
        np.add.at(dense, ids, grads.astype(np.float64))
        touched = np.isin(np.arange(len(table)), ids)
        REFERENCES[name](table, memory, dense, touched, number)
    return table


def adam_reference(table, memory, dense, moving, number):
    memory["m"] = 0.9 * memory["m"] + 0.1 * dense
    memory["v"] = 0.95 * memory["v"] + 0.05 * dense**2
    mean, square = memory["m"] / (1 - 0.9**number), memory["v"] / (1 - 0.95**number)
    table[moving] -= RATE * (mean / (np.sqrt(square) + 1e-8))[moving]


def dense_adam_reference(table, memory, dense, touched, number):
    adam_reference(table, memory, dense, np.ones_like(touched), number)


def rmsprop_reference(table, memory, dense, touched, number):
    for row in np.flatnonzero(touched):
        memory["touches"][row] += 1
        memory["row_v"][row] = 0.95 * memory["row_v"][row] + 0.05 * np.mean(dense[row] ** 2)
        square = memory["row_v"][row] / (1 - 0.95 ** memory["touches"][row])
        table[row] -= RATE * dense[row] / (np.sqrt(square) + 1e-8)


def adagrad_reference(table, memory, dense, touched, number):
    for row in np.flatnonzero(touched):
        memory["row_v"][row] += np.mean(dense[row] ** 2)
        table[row] -= RATE * dense[row] / (np.sqrt(memory["row_v"][row]) + 1e-8)


def balanced_reference(table, memory, dense, touched, number):
    memory["m"] = 0.95 * memory["m"] + 0.05 * dense
    u = 0.95 * memory["m"] + 0.05 * dense
    norms = np.linalg.norm(u, axis=1)
    u[norms <= 1e-3 * norms.mean()] = 0
    for turn in range(11):
        u /= np.linalg.norm(u, axis=1 - turn % 2, keepdims=True) + 1e-20
    table -= 0.18 * RATE * np.sqrt(table.shape[1]) * u


REFERENCES = {"row_adam": adam_reference, "dense_adam": dense_adam_reference,
              "row_rmsprop": rmsprop_reference, "row_adagrad": adagrad_reference,
              "balanced_momentum": balanced_reference}


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_every_optimizer_against_float64(name):
    table_RD, steps = random(20, 4), sparse_steps()
    rows_RD, padding = flat(LAYOUT, run(name, table_RD, steps)[0])
    np.testing.assert_allclose(rows_RD, reference(name, table_RD, steps), rtol=0, atol=2e-6)
    assert (padding == 777).all(), "padding rows are never moved"


@few
@given(name=st.sampled_from(TABLE_OPTIMIZERS), rows=st.integers(1, 20),
       size=st.sampled_from([1, 9]), scale=st.sampled_from([1e-6, 1.0, 1e3]),
       seed=st.integers(0, 2**32))
def test_every_optimizer_on_any_ids_and_scales(name, rows, size, scale, seed):
    draw = np.random.default_rng(seed)
    steps = [(draw.integers(0, rows, size), scale * random(size, 4, seed=seed + i))
             for i in range(4)]
    rows_RD, _ = flat(LAYOUT, run(name, random(20, 4), steps)[0])
    expected = reference(name, random(20, 4), steps)
    # At 1e-6, Adam's eps of 1e-8 beside float32 moments leaves five digits of a step of 1e-2.
    np.testing.assert_allclose(rows_RD, expected, rtol=0, atol=5e-6)


def run_optax_adam(table_RD, steps):
    transform = optax.adam(RATE, **ADAM)
    table = jnp.asarray(table_RD)
    state = transform.init(table)
    for ids, grads in steps:
        updates, state = transform.update(
            jnp.zeros_like(table).at[np.asarray(ids)].add(grads), state)
        table = optax.apply_updates(table, updates)
    return np.asarray(table), state[0]


def test_dense_adam_is_optax_adam_on_the_dense_gradient():
    steps = sparse_steps()
    table, state = run("dense_adam", random(20, 4), steps)
    expected, moments = run_optax_adam(random(20, 4), steps)
    for mine, theirs in ((table, expected), (state.m_SRD, moments.mu), (state.v_SRD, moments.nu)):
        np.testing.assert_allclose(flat(LAYOUT, mine)[0], theirs, rtol=0, atol=1e-6)
    touched = np.isin(np.arange(20), [i for ids, _ in steps[:7] for i in ids])
    rests = np.setdiff1d(np.flatnonzero(touched), steps[7][0])
    before = flat(LAYOUT, run("dense_adam", random(20, 4), steps[:7])[0])[0]
    assert (flat(LAYOUT, table)[0][rests] != before[rests]).any(), "resting rows move, too"


# --- Row Adam ---


def test_row_adam_is_adam_where_every_row_is_touched():
    table_RD = random(20, 4)
    steps = [(np.random.default_rng(i).permutation(20), random(20, 4, seed=i)) for i in range(6)]
    rows_RD, padding = flat(LAYOUT, run("row_adam", table_RD, steps)[0])
    expected, _ = run_optax_adam(table_RD, steps)
    np.testing.assert_allclose(rows_RD, expected, rtol=0, atol=1e-6)
    assert (padding == 777).all()


def test_moments_catch_up_with_dense_adam():
    """After a touch a row's moments equal dense Adam's, however long it rested before."""
    steps = sparse_steps()
    _, state = run("row_adam", random(20, 4), steps)
    _, dense = run_optax_adam(random(20, 4), steps)
    (m, _), (v, _) = flat(LAYOUT, state.m_SRD), flat(LAYOUT, state.v_SRD)
    touched, _ = flat(LAYOUT, state.touched_SR)
    rested = len(steps) - touched[:, None]
    assert {0, 1} < set(rested[:15, 0].tolist()), "the test needs rows that rested"
    np.testing.assert_allclose(m * ADAM["b1"] ** rested, dense.mu, rtol=0, atol=1e-6)
    np.testing.assert_allclose(v * ADAM["b2"] ** rested, dense.nu, rtol=0, atol=1e-6)
    last = {int(row): number for number, (ids, _) in enumerate(steps, 1) for row in ids}
    assert touched.tolist() == [last.get(row, 0) for row in range(20)]


# --- Rows that one float remembers ---


@pytest.mark.parametrize("name", ["row_rmsprop", "row_adagrad"])
@pytest.mark.parametrize("first", [1, 1000])
def test_the_first_touch_moves_a_row_by_the_rate_whenever_it_comes(name, first):
    """Its root mean square is the learning rate, and nothing of the wait before shows."""
    table, _ = run(name, np.zeros((20, 4), np.float32), [([3], random(1, 4))], first=first)
    row = flat(LAYOUT, table)[0][3]
    assert float(np.sqrt(np.mean(row**2))) == pytest.approx(RATE, rel=1e-5)


def test_rmsprop_averages_over_touches_and_not_over_steps():
    steps = [([3], random(1, 4, seed=i)) for i in range(3)]
    rests = [([9], random(1, 4))] * 5
    together = run("row_rmsprop", random(20, 4), steps)
    apart = run("row_rmsprop", random(20, 4), [steps[0], *rests, steps[1], *rests, steps[2]])
    for near, far in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_array_equal(flat(LAYOUT, near)[0][3], flat(LAYOUT, far)[0][3])


# --- Balanced momentum ---


def test_balanced_rows_end_with_norm_one_and_faint_ones_do_not_move():
    """Row 2 is 1e4 times fainter than the rest, row 3 only 100 times; 10..19 have no gradient."""
    grads = random(10, 4)
    grads[2] *= 1e-4
    grads[3] *= 1e-2
    table, _ = run("balanced_momentum", np.zeros((20, 4), np.float32), [(np.arange(10), grads)])
    rows_RD, _ = flat(LAYOUT, table)
    moves = np.linalg.norm(rows_RD, axis=1) / (0.18 * RATE * np.sqrt(4))
    expected = np.ones(20)
    expected[2], expected[10:] = 0, 0
    np.testing.assert_allclose(moves, expected, rtol=1e-5)


def test_the_mean_row_norm_counts_no_padding():
    """Two rows in a layout with room for 64: with padding counted, the faint row would move."""
    layout = TableLayout(rows=2, dim=4, shards=64)
    grads = np.stack([np.ones(4), np.full(4, 2e-4)]).astype(np.float32)
    for threshold, moves in ((1e-3, False), (1e-4, True)):
        optimizer = balanced_momentum(momentum=0.95, least=threshold)
        table, _ = optimizer.update(
            layout, jnp.zeros(layout.shape), optimizer.init(layout), combine([0, 1], grads),
            jnp.int32(1), jnp.float32(RATE))
        assert bool(table[1].any()) == moves
        assert not table[2:].any()


def test_a_column_without_gradient_stays_finite_and_still():
    grads = random(6, 4)
    grads[:, 1] = 0
    table, _ = run("balanced_momentum", np.zeros((20, 4), np.float32), [(np.arange(6), grads)] * 2)
    rows_RD, _ = flat(LAYOUT, table)
    assert np.isfinite(rows_RD).all()
    assert not rows_RD[:, 1].any()
    assert rows_RD[:6, [0, 2, 3]].all()


def test_balanced_momentum_without_any_gradient_does_nothing():
    table, state = run("balanced_momentum", random(20, 4), [([3, 5], np.zeros((2, 4)))] * 2)
    np.testing.assert_array_equal(flat(LAYOUT, table)[0], random(20, 4))
    assert not state.m_SRD.any()


def test_momentum_zero_is_the_balanced_gradient():
    """Then M is G itself, and rows that are not touched do not move."""
    optimizer = balanced_momentum(momentum=0.0)
    table, state = jnp.asarray(filled(LAYOUT, random(20, 4))), optimizer.init(LAYOUT)
    for number in (1, 2):
        table, state = optimizer.update(
            LAYOUT, table, state, combine([number], random(1, 4)), jnp.int32(number),
            jnp.float32(RATE))
    moved = (flat(LAYOUT, table)[0] != random(20, 4)).any(axis=1)
    assert np.flatnonzero(moved).tolist() == [1, 2]


# --- What a step leaves alone ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROW_WISE)
def test_a_row_that_is_not_touched_keeps_its_bits(name, dtype):
    table_RD, steps = stored(random(20, 4), dtype), sparse_steps()
    before, after = run(name, table_RD, steps[:7]), run(name, table_RD, steps)
    rest = np.setdiff1d(np.arange(20), steps[7][0])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        (old_rows, old_pad), (new_rows, new_pad) = flat(LAYOUT, old), flat(LAYOUT, new)
        assert old_rows[rest].tobytes() == new_rows[rest].tobytes()
        assert old_pad.tobytes() == new_pad.tobytes()
        moved = steps[7][0]
        assert (old_rows[moved] != new_rows[moved]).any(), "the touched rows do move"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
@pytest.mark.parametrize("ids", [[UNUSED] * 6, [-3, 20, 21, UNUSED - 1, UNUSED, -(2**31)]])
def test_a_skipped_step_changes_nothing(name, dtype, ids):
    """A step whose gradient is not finite has all its ids set to UNUSED."""
    before = run(name, stored(random(20, 4), dtype), sparse_steps())
    bad = combine(ids, np.full((6, 4), np.nan))
    skipped = updater(name, LAYOUT)(*before, bad, jnp.int32(9), jnp.float32(RATE))
    assert_same_bits(before, skipped)


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_ids_out_of_range_are_dropped_beside_good_ones(name):
    table, steps = stored(random(20, 4)), sparse_steps()
    ids, grads = steps[0]
    more = (np.append(ids, [UNUSED, 20]), np.append(grads, np.full((2, 4), np.nan), axis=0))
    for old, new in zip(jax.tree.leaves(run(name, table, [steps[0]])),
                        jax.tree.leaves(run(name, table, [more])), strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-6)


# --- Both dtypes ---


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_a_bfloat16_step_is_the_float32_step_rounded_by_row_id(name):
    bits_RD, steps = stored(random(20, 4), "bfloat16"), sparse_steps(3)
    exact_RD = np.asarray(rounding.decode(jnp.asarray(bits_RD)))
    (bits, state), (exact, exact_state) = (
        run(name, values, steps[:1]) for values in (bits_RD, exact_RD))
    expected = rounding.encode(
        jnp.asarray(flat(LAYOUT, exact)[0]), jnp.uint16, jnp.arange(20), jnp.int32(1))
    rows_RD, padding = flat(LAYOUT, bits)
    np.testing.assert_array_equal(rows_RD, expected)
    assert (padding == 777).all()
    assert_same_bits(state, exact_state)


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_updates_far_below_a_bfloat16_step_still_add_up(name):
    """100 steps of 2e-4 from 1; neighbours are 0.0039 apart, so nearest would never move."""
    layout = TableLayout(rows=64, dim=32, shards=8)
    config = OptimizerConfig(table_optimizer=name)
    optimizer, rows = row_optimizer(config), combine(np.arange(64), np.ones((64, 32)))
    update = jax.jit(functools.partial(optimizer.update, layout))
    tables = []
    for dtype in DTYPES:
        table = jnp.asarray(filled(layout, stored(np.ones((64, 32), np.float32), dtype)))
        state = optimizer.init(layout)
        for number in range(1, 101):
            table, state = update(table, state, rows, jnp.int32(number), jnp.float32(2e-4))
        tables.append(np.asarray(rounding.decode(table), np.float64))
    moved, expected = (1 - table.mean() for table in tables)
    assert moved == pytest.approx(expected, rel=0.05)
    assert expected > 0.0019


# --- A device's part of a table ---


AXES = ("data", "fsdp")
WHOLE = TableLayout(rows=61, dim=4, shards=8)
PART = WHOLE.part(4)  # 3 places in all are padding


def part_rows(unique, device):
    """What the exchange gives one of four devices: its rows, by their places in its part."""
    ids, grads = np.asarray(unique.ids_U), np.asarray(unique.grads_UD)
    mine = (ids < WHOLE.rows) & (ids % 8 // 2 == device)
    local = np.where(mine, ids % 2 * WHOLE.shape[1] + ids // 8, UNUSED)
    order = np.argsort(local, kind="stable")
    return UniqueRows(
        ids_U=local[order], grads_UD=np.where(mine[:, None], grads, 0)[order],
        used=np.array([mine.sum()]), global_U=np.where(mine, ids, UNUSED)[order])


@functools.cache
def mesh():
    return jax.make_mesh((2, 2), AXES, devices=jax.devices()[:4])


def spread(tree):
    return jax.device_put(tree, NamedSharding(mesh(), P(AXES)))


@functools.cache
def part_updater(name):
    split = P(AXES)
    return jax.jit(jax.shard_map(
        functools.partial(named(name).update, PART, axes=AXES), mesh=mesh(),
        in_specs=(split, split, split, P(), P()), out_specs=(split, split)))


def run_on_mesh(name, table_RD, steps):
    table, state = spread((filled(WHOLE, table_RD), named(name).init(WHOLE)))
    for number, (ids, grads) in enumerate(steps, 1):
        parts = [part_rows(combine(ids, grads), device) for device in range(4)]
        rows = spread(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))
        table, state = part_updater(name)(
            table, state, rows, jnp.int32(number), jnp.float32(RATE))
    return table, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_parts_on_four_devices_equal_the_whole_table(name, dtype):
    """Also with steps in which some devices have no row, and one that is skipped."""
    steps = sparse_steps(6, 61, 16)
    steps[2] = (np.array([0, 1, 8, 9] * 4), steps[2][1])
    steps[4] = (np.full(16, UNUSED), np.full((16, 4), np.nan, np.float32))
    table_RD = stored(random(61, 4), dtype)
    table, state = run_on_mesh(name, table_RD, steps)
    expected, expected_state = run(name, table_RD, steps, WHOLE)
    near = 1e-6 if name == "balanced_momentum" else 0
    np.testing.assert_allclose(
        rounding.decode(table), rounding.decode(expected), rtol=near, atol=near)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (flat(WHOLE, table)[1] == 777).all(), "padding rows are never moved"


def test_balanced_momentum_on_four_devices_against_float64():
    steps = sparse_steps(6, 50, 16)
    rows_RD, _ = flat(WHOLE, run_on_mesh("balanced_momentum", random(61, 4), steps)[0])
    expected = reference("balanced_momentum", random(61, 4), steps)
    np.testing.assert_allclose(rows_RD, expected, rtol=0, atol=2e-6)


def test_the_threshold_is_that_of_the_whole_table_on_every_device():
    """Rows at 0.5 and 2 thousandths of the mean norm, on devices with few rows and many."""
    ids = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 24, 32, 40, 48, 56])
    grads = np.ones((16, 4), np.float32)
    mean = 12 / WHOLE.rows
    grads[[0, 4]], grads[[2, 6]] = 5e-4 * mean, 2e-3 * mean
    table, _ = run_on_mesh("balanced_momentum", np.zeros((61, 4), np.float32), [(ids, grads)])
    moved = flat(WHOLE, table)[0].any(axis=1)
    assert np.flatnonzero(moved).tolist() == np.setdiff1d(ids, [0, 4]).tolist()


# --- Memory ---


def memory_of_step(name, dtype, rows, dim=8):
    """XLA's account of a jitted look-up, backward and update with everything donated."""
    layout, optimizer = TableLayout(rows=rows, dim=dim, shards=16), named(name)

    def step(table, state, ids_N, target_ND, number):
        read = rounding.decode(layout.gather(table, ids_N))
        grads = jax.grad(lambda rows_ND: jnp.sum((rows_ND - target_ND) ** 2))(read)
        unique = exchange.combine(ids_N, grads)
        return optimizer.update(layout, table, state, unique, number, jnp.float32(RATE))

    table = jax.ShapeDtypeStruct(layout.shape, rounding.storage(dtype))
    state = jax.eval_shape(lambda: optimizer.init(layout))
    arguments = (jax.ShapeDtypeStruct((32,), jnp.int32),
                 jax.ShapeDtypeStruct((32, dim), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, *arguments).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((table, state)))
    return compiled.memory_analysis(), held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ROW_WISE, "dense_adam"])
def test_tables_are_updated_in_place(name, dtype):
    """Nothing of the table's size is made beside the donated table and its moments."""
    (small, _), (large, held) = (memory_of_step(name, dtype, n) for n in (10_000, 1_000_000))
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < 100_000
    assert large.alias_size_in_bytes >= held
    assert large.output_size_in_bytes - large.alias_size_in_bytes < 1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_balanced_momentum_makes_a_few_floats_a_row_and_no_more(dtype):
    (narrow, _), (wide, held) = (
        memory_of_step("balanced_momentum", dtype, 100_000, dim) for dim in (8, 64))
    assert wide.temp_size_in_bytes - narrow.temp_size_in_bytes < 100_000
    assert wide.temp_size_in_bytes < 100_000 * 4 * 8
    assert wide.alias_size_in_bytes >= held


def test_state_bytes_of_a_row():
    sizes = {name: state_bytes(named(name), 80) for name in TABLE_OPTIMIZERS}
    assert sizes == {"row_adam": 644, "dense_adam": 640, "row_rmsprop": 8, "row_adagrad": 4,
                     "balanced_momentum": 320}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="libtpu is not installed (extra aot)")
@pytest.mark.parametrize(("name", "dtype"), [
    ("row_adam", "float32"), ("row_rmsprop", "bfloat16"), ("row_adagrad", "float32")])
def test_on_a_tpu_no_table_is_copied(name, dtype):
    """Rows of 128, a TPU's lane: their table lies as gathers and scatters want it."""
    layout, optimizer = TableLayout(rows=4_096_000, dim=128, shards=256).part(1), named(name)
    touched = 65536
    lies = jax.sharding.SingleDeviceSharding(slice_of("v5p:1x1x1").devices[0])

    def update(table, state, ids_U, grads_UD, number):
        unique = UniqueRows(ids_U, grads_UD, jnp.int32(touched), ids_U)
        return optimizer.update(layout, table, state, unique, number, jnp.float32(RATE))

    table = jax.ShapeDtypeStruct(layout.shape, rounding.storage(dtype))
    given = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        (table, jax.eval_shape(lambda: optimizer.init(layout)),
         jax.ShapeDtypeStruct((touched,), jnp.int32),
         jax.ShapeDtypeStruct((touched, 128), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)))
    memory = jax.jit(update, donate_argnums=(0, 1)).lower(*given).compile().memory_analysis()
    assert memory.temp_size_in_bytes < table.size * table.dtype.itemsize / 4
