"""Parameters split over `fsdp`: in one step or in two, they are gathered and scattered alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from engram_jax.model.parameters import Parameter
from engram_jax.training.fsdp import AXES, OVER, gathered, split
from engram_jax.training.placement import make_mesh

MATRIX = np.random.default_rng(0).integers(-8, 8, (3, 16, 24)).astype(np.float32)
SHARE = np.random.default_rng(1).integers(-8, 8, (8, 3, 16, 24)).astype(np.float32)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("near", [0, 2, 4])
def test_a_matrix_is_whole_and_its_gradient_summed_whatever_the_steps(axis, near):
    """Whole numbers, so that the order of the sum does not matter."""
    spec = PartitionSpec(*(OVER if i == 3 + axis else None for i in range(3)))

    def loss(part, share):
        return jnp.sum(gathered(part, axis, "float32", near) * share[0])

    def device(part, share):
        return gathered(part, axis, "float32", near)[None], jax.grad(loss)(part, share)

    whole, grad = jax.jit(jax.shard_map(
        device, mesh=make_mesh(1, 8), in_specs=(spec, PartitionSpec(OVER)),
        out_specs=(PartitionSpec(OVER), spec), check_vma=False))(MATRIX, SHARE)
    assert whole.shape == SHARE.shape
    assert (np.asarray(whole) == MATRIX).all()
    assert (np.asarray(grad) == SHARE.sum(axis=0)).all()


def test_the_other_axis_of_the_mesh_keeps_to_itself():
    def device(part):
        return gathered(part, -1, "float32", 2)[None]

    own = PartitionSpec(AXES[0], None, OVER)
    whole = jax.jit(jax.shard_map(
        device, mesh=make_mesh(2, 4), in_specs=own, out_specs=PartitionSpec(AXES),
        check_vma=False))(MATRIX[:2])
    assert (np.asarray(whole)[:4] == MATRIX[:1]).all()
    assert (np.asarray(whole)[4:] == MATRIX[1:2]).all()


@pytest.mark.parametrize("near", [0, 2])
def test_experts_that_are_not_shared_have_gradients_that_nobody_rounds(near):
    """The matrix arrives in bfloat16; its gradients are sums of numbers that bfloat16 has not."""
    spec, share = PartitionSpec(None, OVER), SHARE + np.float32(2**-12)
    tree = {"experts": Parameter(MATRIX, "matrix", split=True, cast=True, owned=True)}
    how = split(tree, 8, "bfloat16", near, 1, near)

    def device(part, share):
        def whole(part):
            return how.whole({"experts": part})["experts"]

        return whole(part)[None], jax.grad(lambda part: jnp.sum(whole(part) * share[0]))(part)

    whole, grad = jax.jit(jax.shard_map(
        device, mesh=make_mesh(1, 8), in_specs=(spec, PartitionSpec(OVER)),
        out_specs=(PartitionSpec(OVER), spec), check_vma=False))(MATRIX + 2**-12, share)
    assert whole.dtype == jnp.float32
    assert (np.asarray(whole) == np.asarray(jnp.bfloat16(MATRIX + 2**-12), np.float32)).all()
    assert (np.asarray(grad) == share.sum(axis=0)).all()
