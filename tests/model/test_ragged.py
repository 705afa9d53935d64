"""The products of ragged groups, as each device computes them, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.model import moe, ragged
from engram_jax.model.moe import group
from engram_jax.model.ragged import in_batches, in_blocks, kernel_outer, ragged_matmul, ragged_outer

pytestmark = pytest.mark.usefixtures("compilations")

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
    out_EDF = outer(ones_PD, ones_PF, np.array([601, 39, 0, 0], np.int32))
    np.testing.assert_array_equal(out_EDF[:, 0, 0], [601, 39, 0, 0])


@pytest.mark.parametrize("way", [in_batches, ragged._ragged, in_blocks])
def test_gradients_of_float32_matrices_are_not_rounded(way):
    """601 is no bfloat16; the product has the dtype of the slots."""
    ones_PD = jnp.ones((SLOTS, WIDTH), jnp.bfloat16)
    expert_Q = jnp.asarray([0] * 601 + [1] * 39, jnp.int32)
    out_PF, back = jax.vjp(
        lambda weight_EDF: way(ones_PD, weight_EDF, jnp.array([601, 39]), expert_Q),
        jnp.ones((2, WIDTH, HIDDEN)))
    assert out_PF.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back(jnp.ones_like(out_PF))[0][:, 0, 0], [601, 39])


@pytest.mark.parametrize("way", [in_batches, ragged._ragged])
@pytest.mark.parametrize(("tokens", "load"), [
    (1, "even"), (100, "even"), (100, "lopsided"), (100, "one")])
def test_what_accelerators_multiply_is_what_cpus_do(way, tokens, load):
    """On every slot that is filled, and back; loads are even, or one of nine experts has most or
    all tokens."""
    choice = np.random.default_rng(0).integers(0, 9, (tokens, 2))
    choice = {"even": choice, "lopsided": choice // 4, "one": choice * 0 + 4}[load]
    groups = group(jnp.asarray(choice, jnp.int32), 9)
    x, weight = jnp.asarray(random(groups.source_P.size, 6)), jnp.asarray(random(9, 6, 7, seed=1))
    used = int(groups.padded_E.sum())
    weights = jnp.asarray(random(x.shape[0], 7, seed=2)).at[used:].set(0)

    def product(function):
        return jax.jit(jax.value_and_grad(lambda x, weight: jnp.sum(weights * function(
            x, weight, groups.padded_E, groups.expert_Q)), (0, 1)))(x, weight)

    for left, right in zip(*map(jax.tree.leaves, (product(way), product(in_blocks))), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [in_blocks, in_batches])
def test_gradients_of_experts_add_up_in_float32(way):
    """Within blocks, or pieces, and over them. One operation after another: what rounds between
    two of them a compiler may leave out on CPUs."""
    groups = group(jnp.zeros((4096, 1), jnp.int32), 8)
    x_PD, grad_PF = (jnp.asarray(random(groups.source_P.size, 4, seed=seed), jnp.bfloat16)
                     for seed in (0, 1))
    with jax.disable_jit():
        [grad_EDF] = jax.vjp(lambda weight_EDF: way(
            x_PD, weight_EDF, groups.padded_E, groups.expert_Q), jnp.zeros((8, 4, 4)))[1](grad_PF)
    wanted_DF = np.asarray(x_PD[:4096], float).T @ np.asarray(grad_PF[:4096], float)
    np.testing.assert_allclose(grad_EDF[0], wanted_DF, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(grad_EDF[1:], 0)


@pytest.mark.parametrize(("experts", "blocks"), [(16, 128), (55, 275), (41, 205), (5, 25), (1, 4)])
def test_batches_are_bounded_however_lopsided_loads_are(experts, blocks):
    """At most as much again as all experts' first pieces; in rounds of all experts it would take
    as many as there are experts."""
    slots, few = 8 * blocks, min(4, experts)
    for at in ([0], [experts - 1], list(range(few)), list(range(experts))):
        size_E = np.zeros(experts, np.int32)
        size_E[at] = 8 * (blocks // len(at))
        pieces = ragged._Pieces(jnp.asarray(size_E), slots, blocks)
        first_EC = np.asarray(pieces.first())
        further = [np.asarray(pieces.further(number)[1]) for number in range(pieces.batches())]
        assert sum(slot_GC.size for slot_GC in further) <= first_EC.size
        every = np.concatenate([first_EC.ravel(), *map(np.ravel, further)])
        assert sorted(every[every < slots]) == list(range(size_E.sum())), "each slot once"


def test_gpus_go_block_after_block_only_where_blocks_are_few():
    """A token that picks two of eight experts must not read the matrices of all."""
    def program(tokens):
        groups = group(jnp.arange(2 * tokens, dtype=jnp.int32).reshape(tokens, 2) % 8, 8)
        x_PD, weight_EDF = random(groups.source_P.size, 6), random(8, 6, 7)
        return jax.jit(ragged.ragged_product).trace(
            x_PD, weight_EDF, groups.padded_E, groups.expert_Q).lower(
                lowering_platforms=("cuda",)).as_text()

    assert "tensor<8x6x7xf32>, tensor<8x" not in program(1)
    assert "dynamic_slice" in program(1)
    assert "dynamic_slice" not in program(64)
    assert "batching_dims = [0] x [0]" in program(64)


@pytest.mark.parametrize("routed", [moe.experts_here, moe.experts_weighed_first])
def test_what_a_kernel_leaves_in_empty_slots_reaches_nobody(monkeypatch, routed):
    """Kernels may write nothing at all after the last group's slots, forward and backward."""
    product = moe.ragged_product

    def spoilt(out_P, padded_E):
        empty_P = np.arange(out_P.shape[0]) >= jnp.sum(padded_E)
        return jnp.where(empty_P[:, None], jnp.nan, out_P)

    @jax.custom_vjp
    def careless(x_PD, weight_EDF, padded_E, expert_Q):
        return spoilt(product(x_PD, weight_EDF, padded_E, expert_Q), padded_E)

    def backward(saved, grad_PF):
        x_PD, weight_EDF, padded_E, expert_Q = saved
        # Nor is a kernel given what another left, which 0 times it would not undo.
        assert np.isfinite(x_PD).all()
        assert np.isfinite(grad_PF).all()
        grad_PD, grad_EDF = jax.vjp(
            lambda x, weight: product(x, weight, padded_E, expert_Q), x_PD, weight_EDF)[1](grad_PF)
        return spoilt(grad_PD, padded_E), grad_EDF, None, None

    careless.defvjp(lambda *given: (careless(*given), given), backward)
    experts = {"gate": random(EXPERTS, WIDTH, HIDDEN), "up": random(EXPERTS, WIDTH, HIDDEN, seed=1),
               "down": random(EXPERTS, HIDDEN, WIDTH, seed=2)}
    choice_NK = jnp.array([[0, 1], [1, 3], [3, 0], [1, 0], [3, 1]], np.int32)

    def total(experts, x_ND, weight_NK):
        return jnp.sum(routed(experts, x_ND, choice_NK, weight_NK, EXPERTS)[0] ** 2)

    given = jax.tree.map(jnp.asarray, (experts, random(5, WIDTH, seed=3), random(5, 2, seed=4)))
    clean = jax.grad(total, argnums=(0, 1, 2))(*given)
    monkeypatch.setattr(moe, "ragged_product", careless)
    assert moe.group(choice_NK, EXPERTS).source_P.size > 4 * 8, "there should be empty blocks"
    jax.tree.map(np.testing.assert_array_equal, jax.grad(total, argnums=(0, 1, 2))(*given), clean)
