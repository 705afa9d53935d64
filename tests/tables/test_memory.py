"""A memory in somebody else's jitted step, against one big array and jax.grad.

The dense reference keeps each table as rows [R, C] on one device, indexes it with NumPy's hash and
differentiates with respect to all of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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
CHECKED = [(name, "row_rmsprop") for name in ("none", "8 auto", "4x2 explicit", "2x4 both")] + [
    ("8 auto", other) for other in OPTIMIZERS if other != "row_rmsprop"]


@pytest.mark.parametrize(("name", "optimizer"), CHECKED)
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


def test_a_lookup_is_a_pytree():
    memory = memory_on("none")
    lookup = memory.lookup(memory.init(jax.random.key(0)), tokens_of())
    assert isinstance(jax.tree.map(lambda x: x, lookup), Lookup)


def test_rows_of_another_lookup_are_refused():
    memory = memory_on("8 auto")
    lookup = memory.lookup(memory.init(jax.random.key(0)), tokens_of())
    with pytest.raises(UserError, match=r"^row_grads = .* must have the layers and shapes"):
        memory.combine(lookup, {1: lookup.rows[1]})
