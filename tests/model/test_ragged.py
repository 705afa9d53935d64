"""The products of ragged groups, as TPUs compute them, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.model import moe
from engram_jax.model.moe import kernel_outer, ragged_matmul, ragged_outer

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


@pytest.mark.parametrize("outer", [ragged_outer, kernel_outer])
def test_what_nobody_owns_may_be_anything(outer):
    x_PD, grad_PF = random(SLOTS, WIDTH), random(SLOTS, HIDDEN, seed=1)
    size_E = np.array([100, 0, 200, 40], np.int32)
    clean_EDF = outer(x_PD, grad_PF, size_E)
    x_PD[340:], grad_PF[340:] = np.nan, np.inf
    np.testing.assert_array_equal(outer(x_PD, grad_PF, size_E), clean_EDF)


@pytest.mark.parametrize("size_E", [
    [160, 160, 160, 160], [640, 0, 0, 0], [0, 8, 600, 24], [1, 2, 3, 4], [0, 0, 0, 0]])
def test_the_kernel_s_gradient_is_that_of_windows(size_E):
    x_PD, grad_PF = random(SLOTS, WIDTH), random(SLOTS, HIDDEN, seed=1)
    size_E = np.array(size_E, np.int32)
    np.testing.assert_allclose(kernel_outer(x_PD, grad_PF, size_E),
                               ragged_outer(x_PD, grad_PF, size_E), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outer", [ragged_outer, kernel_outer])
def test_the_sum_is_in_float32(outer):
    ones_PD, ones_PF = (jnp.ones((SLOTS, size), jnp.bfloat16) for size in (WIDTH, HIDDEN))
    out_EDF = outer(ones_PD, ones_PF, np.array([600, 40, 0, 0], np.int32))
    assert out_EDF.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out_EDF[:, 0, 0], [600, 40, 0, 0])


def test_what_a_kernel_leaves_in_empty_slots_reaches_nobody(monkeypatch):
    """Kernels may write nothing at all after the last group's slots, forward and backward."""
    product = moe.grouped_matmul

    def spoilt(out_P, groups):
        empty_P = np.arange(out_P.shape[0]) >= jnp.sum(groups.padded_E)
        return jnp.where(empty_P[:, None], jnp.nan, out_P)

    @jax.custom_vjp
    def careless(x_PD, weight_EDF, groups):
        return spoilt(product(x_PD, weight_EDF, groups), groups)

    def backward(saved, grad_PF):
        x_PD, weight_EDF, groups = saved
        # Nor is a kernel given what another left, which 0 times it would not undo.
        assert np.isfinite(x_PD).all()
        assert np.isfinite(grad_PF).all()
        grad_PD, grad_EDF = jax.vjp(
            lambda x, weight: product(x, weight, groups), x_PD, weight_EDF)[1](grad_PF)
        return spoilt(grad_PD, groups), grad_EDF, None

    careless.defvjp(lambda *given: (careless(*given), given), backward)
    experts = {"gate": random(EXPERTS, WIDTH, HIDDEN), "up": random(EXPERTS, WIDTH, HIDDEN, seed=1),
               "down": random(EXPERTS, HIDDEN, WIDTH, seed=2)}
    choice_NK = jnp.array([[0, 1], [1, 3], [3, 0], [1, 0], [3, 1]], np.int32)

    def total(experts, x_ND, weight_NK):
        return jnp.sum(moe.experts_here(experts, x_ND, choice_NK, weight_NK, EXPERTS)[0] ** 2)

    given = jax.tree.map(jnp.asarray, (experts, random(5, WIDTH, seed=3), random(5, 2, seed=4)))
    clean = jax.grad(total, argnums=(0, 1, 2))(*given)
    monkeypatch.setattr(moe, "grouped_matmul", careless)
    assert moe.group(choice_NK, EXPERTS).source_P.size > 4 * 8, "there should be empty blocks"
    jax.tree.map(np.testing.assert_array_equal, jax.grad(total, argnums=(0, 1, 2))(*given), clean)
