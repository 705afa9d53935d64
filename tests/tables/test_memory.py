"""A memory in somebody else's jitted step, against one big array and jax.grad.

The dense reference keeps each table as rows [R, C] on one device, indexes it with NumPy's hash and
differentiates with respect to all of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tables import flat

from engram_jax.config import EngramConfig
from engram_jax.costs.collectives import collectives
from engram_jax.errors import UserError
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.tables import Lookup, Memory, dense_adam, row_adagrad, row_adam, row_rmsprop
from engram_jax.tables.exchange import UniqueRows
from engram_jax.tables.layout import TableLayout, layout_of

pytestmark = pytest.mark.usefixtures("compilations")

RMSPROP = row_rmsprop()
RAW, BATCH, TIME = 100, 8, 6
CONFIG = EngramConfig(layers=(1, 3), rows_per_head=(50, 60), heads=2, head_dim=4, shards=8,
                      table_std=0.5, pad_id=2)
VOCABULARY = CompressedVocabulary(np.arange(RAW) // 2)
MESHES = {
    "none": None,
    "1": ((1,), ("data",), AxisType.Auto),
    "8 auto": ((8,), ("data",), AxisType.Auto),
    "8 explicit": ((8,), ("data",), AxisType.Explicit),
    "4x2 auto": ((4, 2), ("data", "model"), AxisType.Auto),
    "4x2 explicit": ((4, 2), ("data", "model"), AxisType.Explicit),
    "2x4 both": ((2, 4), ("data", "fsdp"), AxisType.Explicit),
}
on_meshes = pytest.mark.parametrize("name", MESHES)
RATE, CLIP = 0.1, 0.5


@functools.cache
def memory_on(name, config=CONFIG, optimizer=RMSPROP, **settings):
    if MESHES[name] is None:
        return Memory(config, VOCABULARY, optimizer=optimizer, **settings)
    shape, axes, kind = MESHES[name]
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes),
                         devices=jax.devices()[:int(np.prod(shape))])
    axes = axes if name.endswith("both") else ("data",)
    return Memory(config, VOCABULARY, mesh=mesh, axes=axes, optimizer=optimizer, **settings)


def spread(memory, tokens):
    """The tokens as a user would put them on the mesh."""
    if memory.mesh is None:
        return jnp.asarray(tokens)
    return jax.device_put(tokens, NamedSharding(memory.mesh, PartitionSpec(memory.axes)))


def tokens_of(seed=0, batch=BATCH, time=TIME):
    return np.random.default_rng(seed).integers(0, RAW, (batch, time)).astype(np.int32)


WEIGHTS = {layer: np.random.default_rng(layer).normal(size=(4, 4)).astype(np.float32)
           for layer in CONFIG.layers}


def loss_of(rows):
    """The mean over all tokens of something that no two rows enter alike."""
    score_BT = sum(jnp.einsum("bthc,hc->bt", each.astype(jnp.float32), WEIGHTS[layer])
                   for layer, each in rows.items())
    return jnp.mean((score_BT - 3.0) ** 2)


def make_step(memory):
    def step(tables, tokens):
        lookup = memory.lookup(tables, tokens)
        loss, row_grads = jax.value_and_grad(loss_of)(lookup.rows)
        combined = memory.combine(lookup, row_grads)
        scale = jnp.minimum(1, CLIP / jnp.sqrt(combined.square))
        return memory.update(tables, combined, RATE, scale), (
            loss, combined.square, combined.touched, lookup.rows)

    return jax.jit(step, donate_argnums=0)


# --- The dense reference ---


@functools.cache
def hashes():
    return Memory(CONFIG, VOCABULARY)._addressing.hashes


def dense_ids(tokens, layer):
    canonical = VOCABULARY.canonical(np.asarray(tokens))
    return hashes()[f"layer_{layer}"].table_ids_numpy(canonical, layer)


def dense_tables(memory):
    tables = memory.init(jax.random.key(0))
    return {site.layer: flat(layout_of(site), np.asarray(tables.values[site.name]))[0]
            for site in memory.sites}


def dense_training(tables, steps, optimizer, batches=None):
    """Tables [R, C] after steps of the same optimizer, given the gradient of every row."""
    layouts = {layer: TableLayout(rows=len(table), dim=4, shards=1)
               for layer, table in tables.items()}
    state = {layer: optimizer.init(layout) for layer, layout in layouts.items()}
    seen = []
    for number in range(steps):
        ids = {layer: dense_ids(tokens_of(number), layer) for layer in tables}

        def loss(tables, ids=ids):
            return loss_of({layer: table[ids[layer]] for layer, table in tables.items()})

        value, grads = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, tables))
        square = sum(float(jnp.sum(grad**2)) for grad in grads.values())
        scale = min(1.0, CLIP / square**0.5)
        for layer, grad in grads.items():
            rows = np.unique(ids[layer]).astype(np.int32)
            moved, state[layer] = optimizer.update(
                layouts[layer], jnp.asarray(tables[layer])[None], state[layer],
                unique_rows(rows, scale * np.asarray(grad)[rows]), jnp.int32(number + 1), RATE)
            tables = {**tables, layer: np.asarray(moved)[0]}
        seen.append((float(value), square, sum(np.unique(i).size for i in ids.values())))
    return tables, seen


def unique_rows(ids, grads):
    return UniqueRows(jnp.asarray(ids), jnp.asarray(grads), jnp.int32(ids.size), jnp.asarray(ids))


OPTIMIZERS = {"row_rmsprop": RMSPROP, "row_adam": row_adam(),
              "row_adagrad": row_adagrad(), "dense_adam": dense_adam()}
QUICK = [("8 auto", "row_rmsprop")]  # the others take minutes
CHECKED = [(name, "row_rmsprop") for name in ("none", "8 auto", "4x2 explicit", "2x4 both")] + [
    ("8 auto", other) for other in OPTIMIZERS if other != "row_rmsprop"]


@pytest.mark.parametrize(("name", "optimizer"), [
    checked if checked in QUICK else pytest.param(*checked, marks=pytest.mark.slow)
    for checked in CHECKED])
def test_three_steps_are_those_of_one_big_array(name, optimizer):
    memory = memory_on(name, optimizer=OPTIMIZERS[optimizer])
    tables, step = memory.init(jax.random.key(0)), make_step(memory)
    expected, seen = dense_training(dense_tables(memory), 3, OPTIMIZERS[optimizer])
    for number, (loss, square, touched) in enumerate(seen):
        tables, got = step(tables, spread(memory, tokens_of(number)))
        assert float(got[0]) == pytest.approx(loss, abs=1e-5)
        assert float(got[1]) == pytest.approx(square, rel=1e-4)
        assert int(got[2]) == touched
    assert int(tables.updates) == 3
    for site in memory.sites:
        rows, _ = flat(layout_of(site), np.asarray(tables.values[site.name]))
        np.testing.assert_allclose(rows, expected[site.layer], rtol=0, atol=2e-5)


@on_meshes
def test_rows_have_the_same_bits_on_every_mesh(name):
    memory = memory_on(name)
    tables = memory.init(jax.random.key(0))
    lookup = memory.lookup(tables, spread(memory, tokens_of()))
    for layer, table in dense_tables(memory).items():
        np.testing.assert_array_equal(lookup.rows[layer], table[dense_ids(tokens_of(), layer)])
    assert int(lookup.outside) == 0


def test_no_collective_is_of_the_tables_size():
    wide = EngramConfig(layers=(1, 3), rows_per_head=(5000, 6000), heads=2, head_dim=4, shards=8)
    memory = memory_on("8 auto", wide)
    lowered = make_step(memory).lower(memory.abstract(), spread(memory, tokens_of()))
    compiled = lowered.compile()
    ids = BATCH * TIME * CONFIG.total_heads
    largest = max(one.bytes for one in collectives(compiled.as_text()))
    assert 0 < largest <= 4 * 4 * 2 * ids, "rows of a batch are all that travels"
    table = sum(site.rows * site.dim * 4 for site in memory.sites)
    assert compiled.memory_analysis().temp_size_in_bytes < table / 8 / 2


# --- Gradients of several look-ups ---


@functools.cache
def gradient_of(name, way):
    """(tables, tokens) -> (loss, square, tables after), the batch at once or in two parts."""
    memory = memory_on(name)

    def part(tables, tokens):
        lookup = memory.lookup(tables, tokens)
        loss, row_grads = jax.value_and_grad(lambda rows: loss_of(rows) / 2)(lookup.rows)
        return loss, lookup, row_grads

    def at_once(tables, tokens_ABT):
        lookup = memory.lookup(tables, tokens_ABT.reshape(-1, TIME))
        loss, row_grads = jax.value_and_grad(loss_of)(lookup.rows)
        return loss, memory.combine(lookup, row_grads)

    def listed(tables, tokens_ABT):
        losses, lookups, row_grads = zip(*(part(tables, each) for each in tokens_ABT), strict=True)
        return sum(losses), memory.combine(lookups, row_grads)

    def scanned(tables, tokens_ABT):
        def body(total, tokens):
            loss, lookup, row_grads = jax.checkpoint(part)(tables, tokens)
            return total + loss, (lookup, row_grads)

        loss, (lookups, row_grads) = jax.lax.scan(body, jnp.float32(0), tokens_ABT)
        return loss, memory.combine(lookups, row_grads)

    def run(tables, tokens_ABT):
        loss, combined = {"at once": at_once, "listed": listed, "scanned": scanned}[way](
            tables, tokens_ABT)
        return loss, combined.square, memory.update(tables, combined, RATE)

    return jax.jit(run)


@pytest.mark.parametrize("way", [pytest.param("listed", marks=pytest.mark.slow), "scanned"])
@pytest.mark.parametrize("name", [
    "8 auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "4x2 explicit"))])
def test_a_batch_in_parts_is_the_batch_at_once(name, way):
    """Parts of a batch may share rows, and each row is updated once."""
    tables = memory_on(name).init(jax.random.key(0))
    tokens_ABT = np.stack([tokens_of(0), tokens_of(1)])
    whole, parts = (gradient_of(name, w)(tables, tokens_ABT) for w in ("at once", way))
    assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    assert float(parts[1]) == pytest.approx(float(whole[1]), rel=1e-5)
    for left, right in zip(jax.tree.leaves(whole[2]), jax.tree.leaves(parts[2]), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


def test_layers_with_one_table_add_up():
    memory = Memory(dataclasses.replace(CONFIG, one_table=True), VOCABULARY)
    lookup = memory.lookup(memory.init(jax.random.key(0)), tokens_of())
    np.testing.assert_array_equal(lookup.rows[1], lookup.rows[3])
    ones = jax.tree.map(jnp.ones_like, lookup.rows)
    alone = memory.combine(lookup, {1: ones[1], 3: 0 * ones[3]})
    assert float(memory.combine(lookup, ones).square) == pytest.approx(4 * float(alone.square))


# --- What a look-up may be given ---


def test_pieces_with_their_history_read_the_rows_of_the_whole():
    memory, tokens = memory_on("8 auto"), tokens_of()
    tables = memory.init(jax.random.key(0))
    whole = memory.lookup(tables, spread(memory, tokens))
    rest = memory.lookup(tables, spread(memory, tokens[:, 4:]), history=tokens[:, 1:4])
    for layer in CONFIG.layers:
        np.testing.assert_array_equal(rest.rows[layer], whole.rows[layer][:, 4:])


def test_ngrams_stop_at_the_start_of_a_document():
    memory, tokens = memory_on("8 explicit"), tokens_of()
    tables = memory.init(jax.random.key(0))
    positions = np.broadcast_to([0, 1, 2, 0, 1, 2], tokens.shape)
    both = memory.lookup(tables, spread(memory, tokens), positions=spread(memory, positions))
    second = memory.lookup(tables, spread(memory, tokens[:, 3:]))
    for layer in CONFIG.layers:
        np.testing.assert_array_equal(both.rows[layer][:, 3:], second.rows[layer])


@pytest.mark.parametrize("bad", [RAW, -1, 2**31 - 1])
def test_a_token_that_there_is_not_is_counted_and_reads_zeros(bad):
    memory, tokens = memory_on("8 auto"), tokens_of()
    tables = memory.init(jax.random.key(0))
    tokens[2, 3] = bad
    lookup = memory.lookup(tables, jnp.asarray(tokens))
    assert int(lookup.outside) == 1
    rows = np.asarray(lookup.rows[1])
    zeros_BT = (rows[:, :, :2] == 0).all((2, 3))  # of the two heads of order 2
    assert np.argwhere(zeros_BT).tolist() == [[2, 3], [2, 4]]
    combined = memory.combine(lookup, jax.tree.map(jnp.ones_like, lookup.rows))
    ids = [np.unique(each) for each in lookup.ids.values()]
    assert int(combined.touched) == sum((each >= 0).sum() for each in ids)


@pytest.mark.parametrize("capacity", [0.01, 0.5, 100.0])
def test_capacity_changes_rounds_and_no_bit(capacity):
    tables = memory_on("8 auto").init(jax.random.key(0))
    right = memory_on("8 auto").lookup(tables, spread(memory_on("8 auto"), tokens_of()))
    memory = memory_on("8 auto", capacity=capacity)
    lookup = memory.lookup(tables, spread(memory, tokens_of()))
    np.testing.assert_array_equal(lookup.rows[3], right.rows[3])
    assert (int(lookup.rounds) == 1) == (int(lookup.overflow) == 0) == (capacity == 100)


# --- bfloat16, and steps that are skipped ---

HALF = dataclasses.replace(CONFIG, table_dtype="bfloat16")


@pytest.mark.slow
def test_a_bfloat16_table_decodes_itself():
    memory = memory_on("8 auto", HALF, dtype="bfloat16")
    tables = memory.init(jax.random.key(0))
    assert tables.values["layer_1"].dtype == jnp.uint16
    lookup = memory.lookup(tables, tokens_of())
    exact = memory_on("8 auto", HALF).lookup(tables, tokens_of()).rows[1]
    assert lookup.rows[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(lookup.rows[1].astype(jnp.float32), exact)
    float32 = memory_on("8 auto").lookup(memory_on("8 auto").init(jax.random.key(0)), tokens_of())
    np.testing.assert_allclose(exact, float32.rows[1], rtol=2**-8)
    moved, _ = make_step(memory)(tables, spread(memory, tokens_of()))
    assert moved.values["layer_1"].dtype == jnp.uint16


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("rate", "scale", "gradient"), [
    (RATE, 0.0, 1.0), (RATE, NAN, 1.0), (RATE, INF, 1.0), (NAN, 1.0, 1.0), (RATE, 1.0, NAN),
    (RATE, 1.0, INF), (RATE, 1.0, 1e30)])
@pytest.mark.parametrize("optimizer", [
    "row_adam", pytest.param("dense_adam", marks=pytest.mark.slow)])
def test_a_skipped_step_changes_no_bit(optimizer, rate, scale, gradient):
    memory = memory_on("8 auto", optimizer=OPTIMIZERS[optimizer])
    tables, after = moved_once(memory, rate, scale, gradient)
    for left, right in zip(jax.tree.leaves(tables), jax.tree.leaves(after), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def moved_once(memory, rate, scale, gradient):
    tables = memory.init(jax.random.key(0))
    lookup = memory.lookup(tables, tokens_of())
    row_grads = {layer: jnp.ones_like(rows).at[3, 2].set(gradient)
                 for layer, rows in lookup.rows.items()}
    return tables, memory.update(tables, memory.combine(lookup, row_grads), rate, scale)


def test_after_skipped_steps_adam_is_optax():
    """Two of four steps have a NaN: the other two are optax's first two on the big array."""
    memory = memory_on("8 auto", optimizer=OPTIMIZERS["dense_adam"])
    tables = memory.init(jax.random.key(0))
    big = jax.tree.map(jnp.asarray, dense_tables(memory))
    adam = optax.adam(RATE, b1=0.9, b2=0.95)
    state = adam.init(big)
    for number, weight in enumerate([NAN, 1.0, NAN, -2.0]):
        lookup = memory.lookup(tables, tokens_of(number))
        combined = memory.combine(lookup, {
            layer: jnp.full(rows.shape, weight) for layer, rows in lookup.rows.items()})
        tables = memory.update(tables, combined, RATE)
        if weight == weight:
            grads = {layer: jnp.zeros_like(table).at[dense_ids(tokens_of(number), layer)].add(
                weight) for layer, table in big.items()}
            updates, state = adam.update(grads, state)
            big = optax.apply_updates(big, updates)
    assert int(tables.updates) == 2
    for site in memory.sites:
        rows, _ = flat(layout_of(site), np.asarray(tables.values[site.name]))
        np.testing.assert_allclose(rows, big[site.layer], rtol=0, atol=1e-5)


# --- What is refused ---


def test_the_pytrees_go_through_tree_map():
    memory = memory_on("none")
    lookup = memory.lookup(memory.init(jax.random.key(0)), tokens_of())
    assert isinstance(jax.tree.map(lambda x: x, lookup), Lookup)


def test_abstract_tables_are_those_of_init():
    memory = memory_on("2x4 both")
    for made, like in zip(jax.tree.leaves(memory.init(jax.random.key(0))),
                          jax.tree.leaves(memory.abstract()), strict=True):
        assert (made.shape, made.dtype) == (like.shape, like.dtype)
        assert made.sharding == like.sharding


OTHERS = {
    "dtype": {"config": dataclasses.replace(CONFIG, table_dtype="bfloat16")},
    "seed": {"config": dataclasses.replace(CONFIG, hash_seed=7)},
    "vocabulary": {"vocabulary": CompressedVocabulary(np.arange(RAW)[::-1] // 2)},
    "optimizer": {"optimizer": row_adam()},
}
others = pytest.mark.parametrize("other", OTHERS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tables with one update, and the folder that Orbax saved them to."""
    memory, folder = memory_on("8 auto"), tmp_path_factory.mktemp("orbax") / "tables"
    tables, _ = make_step(memory)(memory.init(jax.random.key(0)), tokens_of())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tables)
    return tables, folder


@pytest.mark.parametrize("name", ["8 auto", "none", "2x4 both"])
def test_orbax_brings_back_every_bit_on_every_mesh(saved, name):
    tables, folder = saved
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, memory_on(name).abstract())
    assert jax.tree.structure(restored) == jax.tree.structure(tables)
    for here, there in zip(jax.tree.leaves(restored), jax.tree.leaves(tables), strict=True):
        assert np.asarray(here).tobytes() == np.asarray(there).tobytes()
    memory_on(name).lookup(restored, tokens_of())


@others
def test_orbax_refuses_a_checkpoint_of_another_memory(saved, other):
    """Shapes may be equal: it would cast bits by value, or every row would be another n-gram's."""
    memory = dataclasses.replace(memory_on("8 auto"), **OTHERS[other])
    with (ocp.StandardCheckpointer() as checkpointer,
          pytest.raises(ValueError, match=r"(?i)structures? (do not |mis)match")):
        checkpointer.restore(saved[1], memory.abstract())


@others
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_tables_of_another_memory_of_equal_shapes_are_refused(other, jitted):
    memory = dataclasses.replace(memory_on("8 auto"), **OTHERS[other])
    tables, tokens = memory_on("8 auto").init(jax.random.key(0)), tokens_of()
    combined = memory_on("8 auto").combine(
        lookup := memory_on("8 auto").lookup(tables, tokens), lookup.rows)
    for verb in (lambda tables: memory.lookup(tables, tokens),
                 lambda tables: memory.update(tables, combined, RATE)):
        with pytest.raises(UserError, match=r"^tables\.\w+ = .*: are of another memory; this one"):
            (jax.jit(verb) if jitted else verb)(tables)


def mesh_of_eight():
    return memory_on("8 auto").mesh


@pytest.mark.parametrize(("make", "line"), [
    (lambda: Memory(CONFIG, VOCABULARY, mesh_of_eight(), ("model",)),
     r"^Memory.axes = \('model',\): must be axes of the mesh, which has \('data',\)$"),
    (lambda: Memory(CONFIG, VOCABULARY, mesh_of_eight(), "data"),
     r"^Memory.axes = 'data': must be a tuple of axes of the mesh"),
    (lambda: Memory(dataclasses.replace(CONFIG, shards=12), VOCABULARY, mesh_of_eight()),
     r"^EngramConfig.shards = 12: does not divide among 8 devices; set a multiple of 8$"),
    (lambda: Memory(dataclasses.replace(CONFIG, pad_id=RAW), VOCABULARY),
     r"^pad_id = 100: must be a raw token id, in 0..99$"),
    (lambda: Memory(dataclasses.replace(CONFIG, keys="random"), VOCABULARY), "is a control"),
    (lambda: Memory(CONFIG, VOCABULARY, dtype="bf16"), r"^Memory.dtype = 'bf16': "),
    (lambda: Memory(CONFIG, VOCABULARY, optimizer="row_adam"),
     r"^Memory.optimizer = 'row_adam': must be made by one of tables.row_optimizers, as row_adam"),
    (lambda: Memory(CONFIG, VOCABULARY, optimizer=row_adam), r"^Memory.optimizer = <function row"),
    (lambda: Memory(CONFIG, VOCABULARY, capacity=0.0), r"^Memory.capacity = 0.0: "),
    (lambda: TableLayout(rows=9, dim=2, shards=3).init(jax.random.key(0), 1.0, "bf16"),
     r"^dtype = 'bf16': must be float32 or bfloat16$"),
])
def test_a_memory_that_cannot_be_is_refused(make, line):
    with pytest.raises(UserError, match=line):
        make()


@pytest.mark.parametrize(("given", "line"), [
    ({"tokens": tokens_of()[:, 0]}, r"^tokens.shape = \(8,\): must be \[B, T\]$"),
    ({"tokens": tokens_of()[:6]}, r"^tokens.shape = \(6, 6\): has 6 sequences, which do not"),
    ({"tokens": tokens_of() * 1.0}, r"^tokens.dtype = 'float64': must be a whole-number type$"),
    ({"tokens": tokens_of() + 50}, r"^token id = 1\d\d: must be in 0..99"),
    ({"history": tokens_of()[:, :1]}, r"^history.shape = \(8, 1\): must be \(8, 2 or more\)$"),
    ({"positions": tokens_of() * 1.0}, r"^positions.dtype = 'float64': must be a whole-number"),
    ({"positions": tokens_of()[:, :1]}, r"^positions.shape = \(8, 1\): must be \(8, 6\)"),
])
def test_a_lookup_that_cannot_be_is_refused(given, line):
    memory = memory_on("8 auto")
    with pytest.raises(UserError, match=line):
        memory.lookup(memory.abstract(), **{"tokens": tokens_of(), **given})


def test_rows_of_another_lookup_and_tables_of_another_memory_are_refused():
    memory = memory_on("8 auto")
    other = memory_on("8 auto", dataclasses.replace(CONFIG, rows_per_head=(70, 90)))
    tables = memory.init(jax.random.key(0))
    lookup = memory.lookup(tables, tokens_of())
    with pytest.raises(UserError, match=r"^row_grads = .* must have the layers and shapes"):
        memory.combine(lookup, {1: lookup.rows[1]})
    with pytest.raises(UserError, match=r"^row_grads = .* must have the layers and shapes"):
        memory.combine(lookup, {layer: rows[:, :3] for layer, rows in lookup.rows.items()})
    with pytest.raises(UserError, match=r"^row_grads = 1: must be as many as the look-ups"):
        memory.combine([lookup, lookup], [lookup.rows])
    with pytest.raises(UserError, match=r"^tables.values = .* are of another memory"):
        other.lookup(tables, tokens_of())
    with pytest.raises(UserError, match=r"^tables.values = .* are of another memory"):
        other.update(tables, memory.combine(lookup, lookup.rows), RATE)


def test_what_the_verbs_did_not_give_is_refused_by_its_name():
    memory, other = memory_on("8 auto"), memory_on("4x2 auto")
    tables = memory.init(jax.random.key(0))
    lookup, elsewhere = (each.lookup(each.init(jax.random.key(0)), tokens_of())
                         for each in (memory, other))
    grads = lookup.rows
    combined = memory.combine(lookup, grads)
    for call, line in (
            (lambda: memory.combine(lookup, grads[1]), r"^row_grads = 'ArrayImpl': must be a dict"),
            (lambda: memory.combine([lookup], grads), r"^row_grads = 'dict': must be a list"),
            (lambda: memory.combine(grads, grads), r"^lookup = 'dict': must be what Memory.lookup"),
            (lambda: memory.combine([grads], [grads]), r"^lookup = 'dict': must be what Memory.l"),
            (lambda: memory.combine(elsewhere, grads), r"^lookup = 'of 4 devices': is of anoth"),
            (lambda: memory.update(tables, grads, RATE), r"^combined = 'dict': must be what Memor"),
            (lambda: memory.update(tables, other.combine(elsewhere, elsewhere.rows), RATE),
             r"^combined = 'of 4 devices': is of another mesh; 8 share"),
            (lambda: memory.update(tables, combined, RATE, jnp.ones(3)),
             r"^scale = \(3,\): must be one number$"),
            (lambda: memory.update(tables, combined, "fast"),
             r"^learning_rate = 'str': must be one number$"),
            (lambda: memory.lookup(tables.values, tokens_of()), r"^tables = 'dict': must be T")):
        with pytest.raises(UserError, match=line):
            call()


def test_a_memory_inside_a_shard_map_is_refused():
    memory = memory_on("8 auto")
    inside = jax.shard_map(lambda tokens: memory.lookup(memory.abstract(), tokens).rows[1],
                           mesh=memory.mesh, in_specs=PartitionSpec("data"),
                           out_specs=PartitionSpec("data"), check_vma=False)
    with pytest.raises(UserError, match=r"^axes = \('data',\): .* call it outside"):
        jax.eval_shape(inside, tokens_of())
