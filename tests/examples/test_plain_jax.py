"""The example in plain JAX learns on one device and on eight alike, and its checkpoint returns."""

import jax
import numpy as np
import plain_jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.costs.collectives import collectives
from engram_jax.tables import Memory, row_rmsprop

pytestmark = pytest.mark.usefixtures("compilations")
STEPS = 50


@pytest.fixture(scope="module")
def one(compilations, tmp_path_factory):
    return plain_jax.train(jax.devices()[:1], STEPS, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def eight(compilations, tmp_path_factory):
    return plain_jax.train(jax.devices(), STEPS, tmp_path_factory.mktemp("eight"))


def test_it_learns(one):
    losses, _, _ = one
    assert losses[0] > 5, "all bytes are as likely as each other"
    assert np.mean(losses[-5:]) < 3


def test_eight_devices_learn_the_same(one, eight):
    np.testing.assert_allclose(one[0], eight[0], rtol=0, atol=1e-5)
    tables = [state[2] for _, state, _ in (one, eight)]
    assert int(tables[0].updates) == int(tables[1].updates) == STEPS
    for table, other in zip(*(t.values.values() for t in tables), strict=True):
        np.testing.assert_allclose(table, other, rtol=0, atol=1e-4)


def test_the_table_lies_over_all_devices_and_moves_where_it_was_read(eight):
    table = eight[1][2].values["layer_1"]
    assert len(table.sharding.device_set) == 8
    assert table.addressable_shards[0].data.shape[0] == table.shape[0] // 8


@pytest.mark.parametrize("run", ["one", "eight"])
def test_the_checkpoint_comes_back(run, request):
    _, state, restored = request.getfixturevalue(run)
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert left.dtype == right.dtype
        assert left.sharding == right.sharding
        np.testing.assert_array_equal(left, right)


def test_no_collective_is_of_the_tables_size(eight):
    """Gradients of parameters are summed over the devices, and rows of the batch travel."""
    _, state, _ = eight
    mesh = state[2].values["layer_1"].sharding.mesh
    memory = Memory(plain_jax.ENGRAM, mesh=mesh, axes=("data",), optimizer=row_rmsprop())
    text = jax.ShapeDtypeStruct((16, plain_jax.T + 1), np.int32, sharding=NamedSharding(
        mesh, PartitionSpec("data")))
    compiled = plain_jax.make_step(memory).lower(*state, text).compile()
    table = state[2].values["layer_1"].nbytes
    largest = max(one.bytes for one in collectives(compiled.as_text()))
    assert 0 < largest < table / 4
