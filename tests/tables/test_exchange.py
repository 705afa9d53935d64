"""The exchange on meshes of CPU devices against unsharded gathers and plain loops.

One program for each mesh and capacity does all that an exchange can do (`Outcome`); the tests feed
it ids of many kinds. Shapes as in `tables.exchange`; K parts of ids.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tables import filled, flat, random

from engram_jax.costs.collectives import collectives
from engram_jax.errors import UserError
from engram_jax.tables import exchange, row_optimizers
from engram_jax.tables.exchange import UNUSED, Exchange
from engram_jax.tables.layout import TableLayout

pytestmark = pytest.mark.usefixtures("compilations")

AXES = ("data", "fsdp")
SPREAD = PartitionSpec(AXES)
LAYOUT = TableLayout(rows=1000, dim=4, shards=24)  # 8 rows of padding
IDS = 24  # that a device looks up
PROGRAMS = [((1, 1), 5), ((8, 1), 5), ((2, 4), 1), ((2, 4), 5), ((4, 2), 5), ((1, 3), 1000)]
on_programs = pytest.mark.parametrize(
    ("shape", "capacity"), PROGRAMS, ids=lambda value: str(value).replace(", ", "x").strip("()"))


# --- What runs ---


def mesh_of(shape):
    devices = jax.devices()[:shape[0] * shape[1]]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def exchange_of(shape, capacity, layout=LAYOUT):
    devices = shape[0] * shape[1]
    return Exchange(layout=layout, axes=AXES, devices=devices, capacity=capacity)


def on_devices(shape, function, **jit):
    """`function` of what a device holds, compiled for arrays that are spread over the mesh."""
    return jax.jit(jax.shard_map(function, mesh=mesh_of(shape), in_specs=SPREAD, out_specs=SPREAD,
                                 check_vma=False), **jit)


class Outcome(NamedTuple):
    """Rows that were read from both tables, the counts of each device, and what became of the
    gradients: how often each row came, its sum and its global id as its owner saw them."""

    rows: jax.Array
    rows_16: jax.Array
    demand: jax.Array
    outside: jax.Array
    unique: jax.Array
    overflow: jax.Array
    rounds: jax.Array
    square: jax.Array
    touched: jax.Array
    times_SR: jax.Array
    sums_SRD: jax.Array
    global_SR: jax.Array


@functools.cache
def program(shape, capacity, layout=LAYOUT):
    here = exchange_of(shape, capacity, layout)

    def record(carry, rows):
        times_SR, sums_SRD, global_SR = carry
        here_U = jnp.where(jnp.arange(rows.ids_U.size) < rows.used, rows.ids_U, UNUSED)
        return (here.part.add(times_SR, here_U, jnp.ones(here_U.shape, jnp.int32)),
                here.part.put(sums_SRD, rows.ids_U, rows.grads_UD),
                here.part.put(global_SR, rows.ids_U, rows.global_U))

    def run(table_SRD, table_16, ids, grads):
        route = here.route(ids)
        fetched, fetched_16 = (here.lookup(table, ids, route) for table in (table_SRD, table_16))
        back = here.combine(route, grads.reshape(-1, layout.dim))
        part_shape = here.part.shape
        carry = (jnp.zeros(part_shape[:2], jnp.int32), jnp.zeros(part_shape),
                 jnp.full(part_shape[:2], -1, jnp.int32))
        counts = (route.outside, *fetched[1:], back.square, back.touched)
        return Outcome(fetched.rows, fetched_16.rows, here.demand(ids)[None],
                       *(count[None] for count in counts), *here.update(back, carry, record))

    return on_devices(shape, run)


def tables(layout=LAYOUT):
    rows_RD = random(layout.rows, layout.dim)
    return filled(layout, rows_RD), filled(layout, rows_RD.view(np.uint16)[:, :layout.dim])


def gradients(ids, dim=LAYOUT.dim):
    return 0.1 * random(*ids.shape, dim, seed=1)


@functools.cache
def outcome(shape, capacity, case):
    ids = cases(shape[0] * shape[1])[case]
    return jax.tree.map(np.asarray, program(shape, capacity)(*tables(), ids, gradients(ids)))


# --- What it should give ---


@functools.cache
def cases(devices):
    """Ids of many kinds, int32 [B, 3], each device's one after another."""
    draw, size, rows = np.random.default_rng(0), devices * IDS, LAYOUT.rows
    any_id = draw.integers(0, rows, size)
    silent = any_id.copy()
    silent[:IDS] = np.resize([-1, rows, UNUSED, -(2**31)], IDS)
    outside = any_id.copy()
    outside[::3] = np.resize([-1, -24, rows, rows + 7, rows + 8, UNUSED, 2**30, -(2**31)],
                             outside[::3].size)  # some of them in padding
    own = LAYOUT.shards // devices
    last_owner = draw.integers(0, 20, size) * LAYOUT.shards + LAYOUT.shards - 1 - any_id % own
    kinds_of_ids = {
        "any": any_id,
        "one row": np.full(size, 7),
        "all different": draw.permutation(rows)[:size],
        "one owner": last_owner,
        "a silent device": silent,
        "Zipf": (draw.zipf(1.2, size) - 1) % rows,
        "outside": outside,
        "nothing": np.full(size, -1),
    }
    return {name: ids.astype(np.int32).reshape(-1, 3) for name, ids in kinds_of_ids.items()}


CASES = list(cases(1))


def keys_asked(ids, devices, layout=LAYOUT):
    """For each device and each owner the distinct rows that the one asks of the other, as their
    local rows at the owner."""
    own = layout.shards // devices
    asked = []
    for mine in ids.reshape(devices, -1):
        mine = np.unique(mine[(mine >= 0) & (mine < layout.rows)])
        shard, row = mine % layout.shards, mine // layout.shards
        owner, key = shard // own, shard % own * layout.shape[1] + row
        asked.append([np.sort(key[owner == p]) for p in range(devices)])
    return asked


def expected_rounds(asked, capacity):
    """Rounds, and for each device how many of its rows come after the first, by plain loops."""
    devices, most, late = len(asked), 1, np.zeros(len(asked), int)
    if devices == 1:
        return most, late
    for owner in range(devices):
        left, rounds = [mine[owner] for mine in asked], 0
        while rounds == 0 or any(keys.size for keys in left):
            behind = min((keys[capacity] for keys in left if keys.size > capacity), default=UNUSED)
            left = [keys[keys >= behind] for keys in left]
            rounds += 1
            late += [keys.size for keys in left] if rounds == 1 else 0
        most = max(most, rounds)
    return most, late


def dense_gradient(ids, grads, layout=LAYOUT):
    """float64 [rows, D]: the gradient of the whole table."""
    dense = np.zeros((layout.rows, layout.dim))
    inside = (ids >= 0) & (ids < layout.rows)
    np.add.at(dense, ids[inside], grads[inside].astype(np.float64))
    return dense


def check(got, ids, devices, capacity, layout=LAYOUT):
    """All of an outcome."""
    table, table_16 = tables(layout)
    inside = (ids >= 0) & (ids < layout.rows)
    for rows, whole in ((got.rows, table), (got.rows_16, table_16)):
        expected = np.where(inside[..., None], flat(layout, whole)[0][np.where(inside, ids, 0)], 0)
        assert rows.dtype == whole.dtype
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(rows, layout.gather(jnp.asarray(whole), ids))

    asked = keys_asked(ids, devices, layout)
    most, late = expected_rounds(asked, capacity)
    np.testing.assert_array_equal(got.demand, [[keys.size for keys in mine] for mine in asked])
    np.testing.assert_array_equal(got.outside, (~inside).reshape(devices, -1).sum(1))
    np.testing.assert_array_equal(got.unique, got.demand.sum(1))
    np.testing.assert_array_equal(got.overflow, late)
    np.testing.assert_array_equal(got.rounds, most)

    dense = dense_gradient(ids, gradients(ids, layout.dim), layout)
    wanted = np.isin(np.arange(layout.rows), ids)
    for seen, expected in ((got.times_SR, wanted),
                           (got.global_SR, np.where(wanted, np.arange(layout.rows), -1))):
        rows, padding = flat(layout, seen)
        np.testing.assert_array_equal(rows, expected)
        assert (padding == padding.min(initial=0)).all(), "padding has no gradient"
    np.testing.assert_allclose(flat(layout, got.sums_SRD)[0], dense, rtol=0, atol=1e-6)
    owner = np.arange(layout.rows) % layout.shards // (layout.shards // devices)
    own = np.arange(devices)[:, None] == owner
    np.testing.assert_allclose(got.square, own @ (dense**2).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(got.touched, (own & wanted).sum(1))


# --- Rows and gradients ---


@pytest.mark.parametrize("case", CASES)
@on_programs
def test_rows_and_gradients_are_those_of_the_whole_table(shape, capacity, case):
    devices = shape[0] * shape[1]
    check(outcome(shape, capacity, case), cases(devices)[case], devices, capacity)


@pytest.mark.parametrize("case", ["any", "one row", "Zipf"])
def test_sums_have_the_same_bits_again_and_whatever_the_capacity_or_axes(case):
    ids = cases(8)[case]
    again = program((2, 4), 5)(*tables(), ids, gradients(ids))
    for other in (again, *(outcome(shape, capacity, case) for shape, capacity in PROGRAMS
                           if shape[0] * shape[1] == 8)):
        np.testing.assert_array_equal(outcome((2, 4), 5, case).sums_SRD, other.sums_SRD)


@pytest.mark.parametrize("examples", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_any_layout_any_ids_any_capacity(examples):
    few = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    few(given(st.data())(check_any_layout))()


def check_any_layout(data):
    shape = data.draw(st.sampled_from([(2, 4), (1, 3), (2, 1)]))
    devices = shape[0] * shape[1]
    layout = TableLayout(rows=data.draw(st.integers(1, 300)), dim=data.draw(st.integers(1, 3)),
                         shards=devices * data.draw(st.integers(1, 5)))
    capacity = data.draw(st.integers(1, 14))
    for _ in range(4):
        seed, spread = data.draw(st.integers(0, 2**32)), data.draw(st.integers(1, 2 * layout.rows))
        draw = np.random.default_rng(seed)
        ids = draw.integers(-2, spread, (devices * 4, 3)).astype(np.int32)
        got = program(shape, capacity, layout)(*tables(layout), ids, gradients(ids, layout.dim))
        check(jax.tree.map(np.asarray, got), ids, devices, capacity, layout)


def test_a_table_of_nearly_2_31_rows():
    """Keys do not pass int32, up to the last row of the last owner."""
    layout = TableLayout(rows=2**31 - 64, dim=1, shards=64)
    ids = np.array([layout.rows - 1, 0, 63, layout.rows - 64, -1, layout.rows] * 8, np.int32)
    here = exchange_of((2, 4), 2, layout)

    def ask(ids):
        route = here.route(ids)
        return here.demand(ids)[None], route.outside[None], route.first.more[None]

    demand, outside, more = on_devices((2, 4), ask)(ids)
    np.testing.assert_array_equal(demand, [[2, 0, 0, 0, 0, 0, 0, 2]] * 8)
    np.testing.assert_array_equal(outside, [2] * 8)
    assert not np.any(more)


# --- Rounds ---


def test_rounds_of_a_case_made_by_hand():
    """Device 0 asks owner 0 for keys 0..4, device 1 for 3..5, at capacity 2: rounds end at the
    rows 1, 3 and 5, because nobody may ask for more than two in a round."""
    layout = TableLayout(rows=16, dim=2, shards=2)
    ids = 2 * np.array([[0, 1, 2, 3, 4, 4], [3, 4, 5, 5, 5, 3]], np.int32)  # key k is id 2k
    got = program((2, 1), 2, layout)(*tables(layout), ids, gradients(ids, 2))
    assert got.demand.tolist() == [[5, 0], [3, 0]]
    assert got.unique.tolist() == [5, 3]
    assert got.overflow.tolist() == [3, 3]
    assert got.rounds.tolist() == [3, 3]
    check(jax.tree.map(np.asarray, got), ids, 2, 2, layout)


# --- Inside other transformations ---


@functools.cache
def scanned_losses():
    """Of chunks of ids, each looked up inside jax.checkpoint inside a scan; differentiated."""
    here = exchange_of((2, 4), 5)

    def local(table_SRD, ids_KN, weight_D):
        def loss(weight_D):
            @jax.checkpoint
            def chunk(total, ids_N):
                rows_ND = here.lookup(table_SRD, ids_N, here.route(ids_N)).rows
                return total + jnp.sum((rows_ND * weight_D[None])**2), rows_ND

            return jax.lax.scan(chunk, jnp.float32(0), ids_KN)

        (_, rows_KND), grad_D = jax.value_and_grad(loss, has_aux=True)(weight_D)
        return rows_KND, jax.lax.psum(grad_D, AXES)

    return jax.jit(jax.shard_map(
        local, mesh=mesh_of((2, 4)), in_specs=(SPREAD, PartitionSpec(None, AXES), PartitionSpec()),
        out_specs=(PartitionSpec(None, AXES), PartitionSpec()), check_vma=False))


def test_lookups_inside_checkpoint_scan_and_grad():
    ids_KN = np.stack([cases(8)["Zipf"], cases(8)["outside"]]).reshape(2, -1)
    weight_D = np.array([1, -2, 0.5, 3], np.float32)
    table_SRD = tables()[0]
    rows_KND, grad_D = scanned_losses()(table_SRD, ids_KN, weight_D)
    expected = np.asarray(LAYOUT.gather(jnp.asarray(table_SRD), ids_KN))
    np.testing.assert_array_equal(rows_KND, expected)
    by_hand = 2 * weight_D * (expected.astype(np.float64)**2).sum((0, 1))
    np.testing.assert_allclose(grad_D, by_hand, rtol=1e-5)


RATE = 0.1


@functools.cache
def adam_step(shape):
    """A step of row Adam: (table, state, number, ids, grads) -> (table, state)."""
    here = exchange_of(shape, 2)
    update = row_optimizers.row_adam(b1=0.9, b2=0.95, eps=1e-8).update

    def step(table, state, number_P, ids, grads):
        back = here.combine(here.route(ids), grads.reshape(-1, LAYOUT.dim))
        return here.update(back, (table, state), lambda carry, rows: update(
            here.part, *carry, rows, number_P[0], jnp.float32(RATE)))

    return on_devices(shape, step, donate_argnums=(0, 1))


def trained(shape, dtype):
    """Table and state after some steps on the ids of eight devices; each value of a gradient is a
    multiple of 1/8, so that sums do not depend on their order."""
    spread = NamedSharding(mesh_of(shape), SPREAD)
    adam = row_optimizers.row_adam(b1=0.9, b2=0.95, eps=1e-8)
    table = LAYOUT.init(jax.random.key(0), 0.5, dtype)
    table, state = jax.device_put((table, adam.init(LAYOUT)), spread)
    for number, case in enumerate(["Zipf", "any", "outside"]):
        ids = cases(8)[case]
        grads = np.round(8 * random(*ids.shape, LAYOUT.dim, seed=number)) / 8
        before = table
        number_P = np.full(shape[0] * shape[1], number + 1, np.int32)
        table, state = adam_step(shape)(table, state, number_P, ids, grads)
        assert before.is_deleted(), "the table is donated"
    return jax.tree.map(np.asarray, (table, state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizer_does_the_same_on_a_mesh(dtype):
    """Moments within rounding, touches and stochastically rounded bits (nearly) exactly."""
    table, state = trained((1, 1), dtype)
    other, other_state = trained((2, 4), dtype)
    np.testing.assert_array_equal(state.touched_SR, other_state.touched_SR)
    np.testing.assert_allclose(state.m_SRD, other_state.m_SRD, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state.v_SRD, other_state.v_SRD, rtol=1e-5, atol=1e-7)
    if dtype == "float32":
        np.testing.assert_allclose(table, other, rtol=1e-5, atol=1e-6)
    else:  # a value that lies at the edge may be rounded to the neighbour
        assert (table != other).mean() < 1e-3
        assert np.abs(table.astype(int) - other.astype(int)).max() <= 1


# --- What travels ---


def kinds(collectives_of):
    return sorted(one.kind for one in collectives_of)


def test_a_lookup_moves_rows_by_all_to_all_alone():
    here, dim = exchange_of((2, 4), 5), LAYOUT.dim

    def read(table_SRD, ids):
        return here.lookup(table_SRD, ids, here.route(ids)).rows

    text = on_devices((2, 4), read).lower(tables()[0], cases(8)["any"]).compile().as_text()
    seen = collectives(text)
    one_round = ["all-reduce", "all-to-all", "all-to-all"]  # the round's end, ids, rows
    assert kinds(one for one in seen if one.exact) == one_round
    assert kinds(one for one in seen if not one.exact) == one_round
    for one in seen:
        numbers = one.bytes // 4
        if one.kind == "all-reduce":
            assert one.shapes == (("s32", (8,)),)
        else:
            assert numbers == 8 * 5 * (dim if one.shapes[0][0] == "f32" else 1)


def test_without_a_capacity_there_is_room_for_the_even_share():
    """No ids are known to ask for more than 1.25 of their even share here, so one round it is."""
    ids = np.arange(8 * IDS, dtype=np.int32)[:, None]
    got = program((2, 4), 0)(*tables(), ids, gradients(ids))
    assert got.rounds.tolist() == [1] * 8
    check(jax.tree.map(np.asarray, got), ids, 8, IDS)


# --- Checking itself ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Exchange):
    """An exchange whose devices are asked for what is not asked of them."""

    fault: str

    def _swap(self, send):
        asked = super()._swap(send)
        if self.fault == "to the neighbour":
            asked = jax.lax.ppermute(asked, self.axes, [(i, (i + 1) % 8) for i in range(8)])
        if self.fault == "one key changed":
            asked = jnp.where(asked == jnp.min(asked), asked + 1, asked)
        if self.fault == "one peer silent":
            asked = asked.at[3].set(UNUSED)
        if self.fault == "one key in two places":
            asked = asked.at[:, 1].set(asked[:, 0])
        return asked


@pytest.mark.parametrize(("fault", "agrees"), [
    ("none", True), ("to the neighbour", False), ("one key changed", False),
    ("one peer silent", False), ("one key in two places", False)])
@pytest.mark.parametrize("capacity", [2, 0])
def test_devices_notice_when_rows_do_not_reach_their_owners(fault, agrees, capacity):
    here = Broken(layout=LAYOUT, axes=AXES, devices=8, capacity=capacity, fault=fault)
    check = on_devices((2, 4), lambda ids: here.agrees(here.route(ids))[None])
    assert np.asarray(check(cases(8)["any"])).tolist() == [agrees] * 8


# --- What is refused ---


def inside_a_shard_map(function):
    """`function` of a device's part of the table and ids, traced on eight devices."""
    jax.eval_shape(on_devices((2, 4), function), tables()[0], cases(8)["any"])


@pytest.mark.parametrize(("function", "line"), [
    (lambda table, ids: Exchange(layout=LAYOUT).route(ids),
     r"^Exchange.axes = \(\): .* each device would have a table of its own$"),
    (lambda table, ids: Exchange(layout=LAYOUT, axes=("model",), devices=8).route(ids),
     r"^Exchange.axes = \('model',\): the jax.shard_map around it has \{'data': 2, 'fsdp': 4\}$"),
    (lambda table, ids: Exchange(layout=LAYOUT, axes=("data",), devices=8).route(ids),
     r"^Exchange.devices = 8: the jax.shard_map around it has"),
    (lambda table, ids: exchange_of((2, 4), 5).route(ids * 1.0), r"^ids.dtype = 'float32': "),
    (lambda table, ids: read_by(exchange_of((2, 4), 5), jnp.zeros(LAYOUT.shape), ids),
     r"^table.shape = \(24, 42, 4\): must be \(3, 42, 4\), what one of 8 devices holds$"),
    (lambda table, ids: read_by(exchange_of((2, 4), 5), table, ids, ids[:2]),
     r"^ids.shape = \(8, 3\): must be the 6 ids of the route$"),
    (lambda table, ids: exchange_of((2, 4), 5).combine(
        exchange_of((2, 4), 5).route(ids), jnp.zeros((8, 3, 4))),
     r"^grads.shape = \(8, 3, 4\): must be \(24, 4\), one gradient for each id of the route$"),
    (lambda table, ids: LAYOUT.gather(table, ids),
     r"^table.shape = \(3, 42, 4\): must begin with \(24, 42\), as this layout does"),
    (lambda table, ids: row_optimizers.row_adagrad().update(
        LAYOUT, table, row_optimizers.row_adagrad().init(exchange_of((2, 4), 5).part),
        exchange.combine(ids.reshape(-1), jnp.zeros((24, 4))), jnp.int32(1), 1.0),
     r"^table.shape = \(3, 42\): must begin with \(24, 42\), as this layout does"),
])
def test_what_does_not_go_together_inside_a_shard_map_is_refused(function, line):
    with pytest.raises(UserError, match=f"(?m){line}"):  # jax adds lines of its own
        inside_a_shard_map(function)


def read_by(here, table_SRD, ids, routed=None):
    return here.lookup(table_SRD, ids, here.route(ids if routed is None else routed)).rows


@pytest.mark.parametrize(("make", "line"), [
    (lambda: Exchange(layout=LAYOUT, axes=AXES, devices=5),
     r"^shards = 24: does not divide among 5 devices; set a multiple of 5$"),
    (lambda: Exchange(layout=LAYOUT, devices=8), r"^Exchange.axes = \(\): must name the mesh axes"),
    (lambda: Exchange(layout=LAYOUT, capacity=-1), r"^Exchange.capacity = -1: "),
    (lambda: exchange_of((2, 4), 5).route(jnp.arange(3)),
     r"^Exchange.axes = \('data', 'fsdp'\): there is no jax.shard_map around it$"),
    (lambda: row_optimizers.row_adam().update(
        LAYOUT, jnp.zeros(LAYOUT.shape), row_optimizers.row_adam().init(LAYOUT),
        exchange.combine(jnp.arange(3), jnp.zeros((3, 4))), 0, 1.0),
     r"^number = 0: must count the updates from 1$"),
])
def test_an_exchange_that_cannot_be_is_refused(make, line):
    with pytest.raises(UserError, match=line):
        make()


def test_one_device_may_use_either_layout():
    """Its part counts keys and the whole table row ids: an update is right by both."""
    here = Exchange(layout=LAYOUT)
    ids = jnp.asarray(cases(1)["Zipf"])
    combined = here.combine(here.route(ids), gradients(ids).reshape(-1, LAYOUT.dim))
    adagrad = row_optimizers.row_adagrad()
    table = jnp.asarray(tables()[0])
    tables_after = [
        here.update(combined, (table, adagrad.init(layout)), lambda carry, rows: (
            adagrad.update(layout, *carry, rows, jnp.int32(1), RATE)))[0]  # noqa: B023
        for layout in (here.part, here.layout)]
    np.testing.assert_array_equal(*tables_after)
    assert (tables_after[0] != table).any()


def test_a_number_of_0_gives_no_nan():
    """Where only the device sees it, an update that was never counted is the first."""
    adam, rows = row_optimizers.row_adam(), exchange.combine(jnp.arange(3), jnp.ones((3, 4)))
    update = jax.jit(lambda number: adam.update(
        LAYOUT, jnp.zeros(LAYOUT.shape), adam.init(LAYOUT), rows, number, RATE)[0])
    assert np.isfinite(update(jnp.int32(0))).all()


def test_one_device_says_nothing():
    here = Exchange(layout=LAYOUT)

    def everything(table_SRD, ids, grads):
        route = here.route(ids)
        rows = here.lookup(table_SRD, ids, route).rows
        back = here.combine(route, grads)
        table_SRD = here.update(back, table_SRD, lambda table, unique: LAYOUT.add(
            table, unique.ids_U, unique.grads_UD))
        return table_SRD, rows, back.square

    ids = cases(1)["outside"].reshape(-1)
    lowered = jax.jit(everything).lower(tables()[0], ids, gradients(ids))
    assert collectives(lowered.compile()) == []
    assert "while" not in lowered.as_text(), "one device needs no rounds"
