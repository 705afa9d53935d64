"""The examples in Flax learn on one device and on eight alike, with a dense table's gradients."""

import flax_linen
import flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engram_jax import Memory, row_rmsprop
from engram_jax.tables.layout import gather_rows

pytestmark = pytest.mark.usefixtures("compilations")
STEPS = 50
EXAMPLES = {"linen": flax_linen, "nnx": flax_nnx}


@pytest.fixture(scope="module", params=[
    "linen", pytest.param("nnx", marks=pytest.mark.slow)])  # its gradients are in the fast set
def example(request):
    return EXAMPLES[request.param]


@pytest.fixture(scope="module")
def one(compilations, example, tmp_path_factory):
    return example.train(jax.devices()[:1], STEPS, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def eight(compilations, example, tmp_path_factory):
    return example.train(jax.devices(), STEPS, tmp_path_factory.mktemp("eight"))


def test_it_learns(one):
    assert one[0][0] > 5, "all bytes are as likely as each other"
    assert np.mean(one[0][-5:]) < 3


@pytest.mark.slow
def test_eight_devices_learn_the_same(one, eight):
    np.testing.assert_allclose(one[0], eight[0], rtol=0, atol=1e-5)
    tables = [state[2] for _, state, _ in (one, eight)]
    assert int(tables[0].updates) == int(tables[1].updates) == STEPS
    assert len(tables[1].values["layer_1"].sharding.device_set) == 8


def test_the_checkpoint_comes_back(one):
    assert_the_same(*one[1:])


@pytest.mark.slow
def test_the_checkpoint_of_eight_devices_comes_back(eight):
    assert_the_same(*eight[1:])


def assert_the_same(state, restored):
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert left.dtype == right.dtype
        assert left.sharding == right.sharding
        np.testing.assert_array_equal(left, right)


def pure_loss(example):
    """(parameters, loss_fn(params, rows, text)) of the example's network."""
    if example is flax_nnx:
        graph, params, rest = nnx.split(flax_nnx.Transformer(nnx.Rngs(0)), nnx.Param, ...)
        return params, lambda params, rows, text: flax_nnx.loss_fn(
            nnx.merge(graph, params, rest), rows, text)
    rows = {1: jnp.zeros((1, flax_linen.T, 8, 8))}
    params = jax.jit(flax_linen.Transformer().init)(
        jax.random.key(0), jnp.zeros((1, flax_linen.T), jnp.int32), rows)
    return params, flax_linen.loss_fn


@pytest.mark.parametrize("name", [
    "linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_gradients_are_those_of_a_dense_table_on_one_device(name):
    example = EXAMPLES[name]
    config, devices = example.ENGRAM, jax.devices()
    text = np.random.default_rng(0).integers(0, 9, (16, example.T + 1)).astype(np.int32)
    params, loss_fn = pure_loss(example)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    memory = Memory(config, mesh=mesh, axes=("data",), optimizer=row_rmsprop())
    tables = memory.init(jax.random.key(1))

    def sharded(params, tables, text):
        lookup = memory.lookup(tables, text[:, :-1])
        loss, (grads, row_grads) = jax.value_and_grad(loss_fn, (0, 1))(params, lookup.rows, text)
        return loss, grads, lookup.ids, row_grads[1], memory.combine(lookup, row_grads).square

    def dense(params, table, ids, text):
        rows = gather_rows(config, {"layer_1": table}, ids)["layer_1"]
        return loss_fn(params, {1: rows}, text)

    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    loss, grads, ids, row_grads, square = jax.jit(sharded)(
        jax.device_put(params, whole), tables, jax.device_put(text, split))
    alone = jax.device_put((params, tables.values["layer_1"], ids, text), devices[0])
    expected, (dense_grads, table_grad) = jax.jit(jax.value_and_grad(dense, (0, 1)))(*alone)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for left, right in zip(jax.tree.leaves(grads), jax.tree.leaves(dense_grads), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6 + 1e-5 * np.abs(right).max())
    assert float(square) == pytest.approx(float(jnp.sum(table_grad**2)), rel=1e-5)
    summed = np.zeros(table_grad.shape, np.float32)
    row_ids = np.asarray(ids["layer_1"])
    np.add.at(summed, (row_ids % config.shards, row_ids // config.shards), np.asarray(row_grads))
    np.testing.assert_allclose(
        summed, table_grad, rtol=0, atol=1e-4 * float(jnp.abs(table_grad).max()))
