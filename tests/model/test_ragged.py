"""The products of ragged groups, as TPUs compute them, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.model.moe import ragged_matmul, ragged_outer

EXPERTS, WIDTH, HIDDEN, SLOTS = 4, 6, 5, 640


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_definition(x_PD, weight_EDF, size_E):
    expert_P = np.repeat(np.arange(EXPERTS), size_E)
    used = expert_P.size
    out_PF = jnp.einsum("pd,pdf->pf", x_PD[:used], weight_EDF[expert_P])
    return jnp.concatenate([out_PF, jnp.zeros((len(x_PD) - used, HIDDEN))])


@pytest.mark.parametrize("size_E", [
    [160, 160, 160, 160], [640, 0, 0, 0], [0, 0, 0, 640], [0, 8, 600, 24], [1, 2, 3, 4],
    [0, 0, 0, 0], [3, 257, 256, 100]])
def test_gradients(size_E):
    """Even, lopsided and empty groups; sizes that no window divides; slots that nobody owns."""
    x_PD, weight_EDF = random(SLOTS, WIDTH), random(EXPERTS, WIDTH, HIDDEN, seed=1)
    weights_PF = random(SLOTS, HIDDEN, seed=2)
    size_E = np.array(size_E, np.int32)

    def total(product):
        return lambda x, weight: jnp.sum(product(x, weight, size_E) * weights_PF)

    ours = jax.jit(jax.grad(total(ragged_matmul), argnums=(0, 1)))(x_PD, weight_EDF)
    theirs = jax.grad(total(by_definition), argnums=(0, 1))(x_PD, weight_EDF)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_what_nobody_owns_may_be_anything():
    x_PD, grad_PF = random(SLOTS, WIDTH), random(SLOTS, HIDDEN, seed=1)
    size_E = np.array([100, 0, 200, 40], np.int32)
    clean_EDF = ragged_outer(x_PD, grad_PF, size_E)
    x_PD[340:], grad_PF[340:] = np.nan, np.inf
    np.testing.assert_array_equal(ragged_outer(x_PD, grad_PF, size_E), clean_EDF)


def test_the_sum_is_in_float32():
    ones_PD, ones_PF = (jnp.ones((SLOTS, size), jnp.bfloat16) for size in (WIDTH, HIDDEN))
    out_EDF = ragged_outer(ones_PD, ones_PF, np.array([600, 40, 0, 0], np.int32))
    assert out_EDF.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out_EDF[:, 0, 0], [600, 40, 0, 0])
