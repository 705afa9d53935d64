"""Tokens that travel to their experts get what they would get at home, forward and backward."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from links import chips

from engram_jax.config import MoEConfig
from engram_jax.costs.collectives import Collective, by_kind, collectives
from engram_jax.costs.slices import CHIPS, Slice
from engram_jax.model.moe import experts_here, moe, moe_parameters
from engram_jax.model.parameters import values
from engram_jax.model.sent_experts import ROOM, SentExperts, pays_to_all
from engram_jax.tables.collectives import extent, in_blocks
from engram_jax.training import placement
from engram_jax.training.fsdp import AXES, own_gathered

pytestmark = pytest.mark.usefixtures("compilations")

CONFIG = MoEConfig(experts=6, top_k=2, shared=0, expert_ffn=8)
WIDTH = 16


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = random(8, 12, WIDTH)


def outputs_and_gradients(bias_E, room, to_all=False):
    """Of `moe` on eight devices, four of which share the experts; `room` None has all at home. A
    jitted function of the tokens [B, T, D]."""
    mesh = placement.make_mesh(1, 2, expert=4)
    params = values(moe_parameters(jax.random.key(0), WIDTH, CONFIG))
    routed = experts_here if room is None else SentExperts(
        axis="expert", devices=4, everywhere=AXES, to_all=to_all, room=room)

    def local(params, x_BTD):
        def loss(params, x_BTD):
            experts = params["experts"]
            if room is not None:
                experts = jax.tree.map(lambda part: own_gathered(part, -2, "float32", 4, 0), {
                    name: part_of(matrix) for name, matrix in experts.items()})
            out_BTD, load_E = moe({**params, "experts": experts}, x_BTD, bias_E, CONFIG, routed)
            return jnp.sum(out_BTD * (1 + x_BTD)), (out_BTD, load_E)

        grads, (out_BTD, load_E) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)
        return (out_BTD, grads[1], jax.lax.psum(grads[0], AXES),
                jax.lax.psum(load_E, AXES))

    def part_of(matrix):
        """This device's rows of every expert, as `fsdp.split` lays them."""
        rows = matrix.shape[1] // 8
        return jax.lax.dynamic_slice_in_dim(
            matrix, jax.lax.axis_index(("fsdp", "expert")) * rows, rows, 1)

    split, everywhere = PartitionSpec(AXES), PartitionSpec()
    return jax.jit(functools.partial(jax.shard_map(
        local, mesh=mesh, in_specs=(everywhere, split), out_specs=(split, split, everywhere,
                                                                   everywhere),
        check_vma=False), params))


@functools.cache
def at_home(skewed):
    bias_E = np.array([0, 0, 9, 0, 0, 9], np.float32) if skewed else np.zeros(6, np.float32)
    return bias_E, outputs_and_gradients(bias_E, None)(X)


@pytest.mark.parametrize("room", [*(pytest.param(room, marks=pytest.mark.slow)
                                    for room in (4.0, 1.25)), 0.3])
@pytest.mark.parametrize("skewed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("to_all", [False, True])
def test_sent_is_at_home(skewed, room, to_all):
    """Room for all, for an even share, and so little that it takes many rounds; routers that pick
    evenly, and ones that pick two experts of all; tokens that go with their assignments, and ones
    that go to all."""
    bias_E, home = at_home(skewed)
    sent = outputs_and_gradients(bias_E, room, to_all)(X)
    for ours, theirs in zip(jax.tree.leaves(sent), jax.tree.leaves(home), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(sent[3], home[3])
    assert int(jnp.sum(sent[3])) == 8 * 12 * 2


@pytest.mark.parametrize("room", [4.0, 0.3])
def test_gradients_of_matrices_are_not_rounded(room):
    """In one round and in many: every token is 1, so a gradient is a count of tokens times a
    number, and the sum of rounded ones is another one."""
    mesh = placement.make_mesh(1, 1, expert=4)
    routed = SentExperts(axis="expert", devices=4, everywhere=AXES, to_all=True, room=room)
    tokens = 601  # of a device; of four 2404, and of neither a bfloat16
    choice_NK = jnp.zeros((4 * tokens, 1), jnp.int32)
    parts = {name: jnp.ones((4, *shape)) / WIDTH for name, shape in (
        ("gate", (WIDTH, 8)), ("up", (WIDTH, 8)), ("down", (8, WIDTH)))}

    def local(parts, x_ND, choice_NK):
        def loss(parts):
            experts = {name: own_gathered(part, -2, "bfloat16", 4, 0)
                       for name, part in parts.items()}
            return jnp.sum(routed(experts, x_ND, choice_NK, jnp.ones(choice_NK.shape), 4)[0])

        return jax.grad(loss)(parts)

    split = PartitionSpec(None, AXES)
    grads = jax.jit(jax.shard_map(
        local, mesh=mesh, in_specs=(split, PartitionSpec(AXES), PartitionSpec(AXES)),
        out_specs=split, check_vma=False))(
            parts, jnp.ones((4 * tokens, WIDTH), jnp.bfloat16), choice_NK)
    one = jnp.float32(jax.nn.silu(jnp.bfloat16(1)))
    np.testing.assert_allclose(grads["down"][0], 4 * tokens * one, rtol=1e-6)
    np.testing.assert_allclose(grads["up"][0], 4 * tokens * one, rtol=1e-6)


@pytest.mark.parametrize(("skewed", "room", "rounds"), [
    (False, 4.0, 1), (True, 2.0, 1), (True, 1.25, 2), (True, 0.5, 2)])
def test_rounds_follow_the_fullest_peer(skewed, room, rounds):
    """24 assignments a device, an even share of six; of two experts that have all, each owner gets
    twelve. A further round has room for eight."""
    mesh = placement.make_mesh(1, 2, expert=4)
    routed = SentExperts(axis="expert", devices=4, everywhere=AXES, to_all=False, room=room)
    choice_NK = np.tile([[2, 5]] if skewed else [[0, 5], [2, 3]], (8 * 12 // (2 - skewed), 1))
    taken = jax.jit(jax.shard_map(
        lambda choice_NK: routed.rounds(routed.way(choice_NK, 6))[None], mesh=mesh,
        in_specs=PartitionSpec(AXES), out_specs=PartitionSpec(AXES)))(choice_NK.astype(np.int32))
    assert taken.tolist() == [rounds] * 8


@pytest.mark.parametrize(("to_all", "trips"), [
    (False, {"all-to-all": 4}), (True, {"all-to-all": 2, "all-gather": 2})])
def test_what_travels_in_a_round(to_all, trips):
    """Tokens there, results back, the gradients of results there and of tokens back."""
    program = outputs_and_gradients(np.zeros(6, np.float32), 4.0, to_all).lower(X).compile()
    of_tokens = [each.kind for each in collectives(program) if each.exact
                 and len(each.shapes[0][1]) == 2 and each.shapes[0][1][1] == WIDTH]
    assert collections.Counter(of_tokens) == trips


def test_tokens_go_to_all_where_that_is_less():
    """By the links of a torus, by the bytes elsewhere; the paper picks 6, `tiny` 2."""
    assert pays_to_all(6, devices=16, block=(16,))
    assert not pays_to_all(2, devices=16, block=(16,))
    assert not pays_to_all(6, devices=16, block=(4, 4))
    assert pays_to_all(6, devices=4, block=())
    assert not pays_to_all(6, devices=8, block=())


@pytest.mark.parametrize("sizes", [(16, 16), (4, 4, 4)])
@pytest.mark.parametrize("devices", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("choices", [2, 6, 8, 12])
def test_the_links_say_the_same(sizes, devices, choices):
    """Of blocks of a slice."""
    slices = Slice(chip=CHIPS["v5e" if len(sizes) == 2 else "v5p"], sizes=sizes,
                   devices=chips(*sizes))
    there = slices.torus(in_blocks(slices.devices, devices))
    block = extent(in_blocks(slices.devices, devices)[:devices])
    groups = tuple(map(tuple, np.arange(len(there.places)).reshape(-1, devices).tolist()))

    def seconds(kind, size):
        return there.seconds(Collective(kind=kind, shapes=(), bytes=size, times=1, exact=True,
                                        groups=groups, source=""))

    to_all, each = seconds("all-gather", 8e6), seconds("all-to-all", ROOM * choices * 8e6)
    assert pays_to_all(choices, devices, block) is (to_all <= each)



@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_in_a_loop_over_blocks_tokens_travel_three_times_and_results_twice(remat):
    """Whatever is kept for the backward pass, as that computes rounds anew."""
    mesh = placement.make_mesh(1, 1, expert=4)
    routed = SentExperts(axis="expert", devices=4, everywhere=AXES, to_all=True)

    def local(experts, x_ND, choice_NK, weight_NK):
        def block(x_ND, experts):
            return x_ND + routed(experts, x_ND, choice_NK, weight_NK, 4)[0], None

        def loss(experts, x_ND):
            run = jax.checkpoint(block) if remat else block
            return jnp.sum(jax.lax.scan(run, x_ND, experts)[0] ** 2)

        return jax.grad(loss, argnums=(0, 1))(experts, x_ND)

    split, shared = PartitionSpec(AXES), PartitionSpec(None, "expert")
    shapes = {"gate": (2, 4, WIDTH, 8), "up": (2, 4, WIDTH, 8), "down": (2, 4, 8, WIDTH)}
    program = jax.jit(jax.shard_map(
        local, mesh=mesh, in_specs=(shared, split, split, split), out_specs=(shared, split),
        check_vma=False)).lower(
            {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
            np.zeros((32, WIDTH), np.float32), np.zeros((32, 2), np.int32),
            np.zeros((32, 2), np.float32)).compile()
    travels = by_kind(each for each in collectives(program) if each.exact
                      and len(each.shapes[0][1]) == 2 and each.shapes[0][1][1] == WIDTH)
    assert {kind: total["count"] for kind, total in travels.items()} == {
        "all-gather": 2 * 3, "all-to-all": 2 * 2}
