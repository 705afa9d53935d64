"""DeepSeekMoE: shared and routed experts, dropless, with loss-free balancing.

Assignments (token, choice) are laid out expert after expert, each expert's share padded to whole
blocks, so that every block meets one expert's weights and no token is ever dropped.

Shapes: N tokens, A = N * K assignments (K choices a token), P padded slots, Q blocks of them,
E experts, D width, F expert FFN.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import MoEConfig
from engram_jax.model.layers import Params, ffn, ffn_parameters
from engram_jax.model.parameters import Declared, counted_as, expert_matrix, router
from engram_jax.model.ragged import ragged_product

LEAST = -32.0  # logit of the router, see `route`


def moe_parameters(key: jax.Array, width: int, config: MoEConfig) -> Declared:
    """router [D, E]; experts gate, up [E, D, F], down [E, F, D]; shared, one FFN."""
    router_key, shared_key, gate_key, up_key, down_key = jax.random.split(key, 5)
    experts, hidden = config.experts, config.expert_ffn
    declared: Declared = {
        "router": counted_as("routers", router(router_key, width, experts)),
        "experts": counted_as("routed experts", {
            "gate": expert_matrix(gate_key, experts, width, hidden),
            "up": expert_matrix(up_key, experts, width, hidden),
            "down": expert_matrix(down_key, experts, hidden, width),
        }),
    }
    if config.shared:
        declared["shared"] = counted_as(
            "shared experts", ffn_parameters(shared_key, width, config.shared * hidden))
    return declared


# (experts, tokens [N, D], choices [N, K], their weights float32 [N, K], how many experts there are)
# -> what each token's choices make of it, weighed and added up, [N, D], and the assignments of each
# expert, int32 [E].
Routed = Callable[
    [Params, jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


def experts_here(
    experts: Params, x_ND: jax.Array, choice_NK: jax.Array, weight_NK: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
    """The `Routed` of a device that has all experts: what they give is weighed."""
    groups = group(choice_NK, number)
    out_NKD = from_slots(grouped_ffn(experts, to_slots(x_ND, groups), groups), groups)
    return jnp.einsum("nkd,nk->nd", out_NKD, weight_NK.astype(x_ND.dtype)), groups.count_E


def experts_weighed_first(
    experts: Params, x_ND: jax.Array, choice_NK: jax.Array, weight_NK: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
    """The same for TPUs: hidden units are weighed, so that neither it nor a gradient needs
    [N, K, D], which libtpu lays out in a way of its own and adds up from there."""
    groups = group(choice_NK, number)
    weight_P = slot_weights(weight_NK, groups.source_P, groups.slot_NK)
    # Empty slots weigh 0, and so count for no gradient whatever is in them.
    out_PD = grouped_ffn(experts, to_slots(x_ND, groups, "clip"), groups, weight_P)
    return _of_choices(out_PD, groups), groups.count_E


@jax.named_scope("experts")
def moe(
    params: dict, x_BTD: jax.Array, bias_E: jax.Array, config: MoEConfig,
    routed: Routed = experts_here,
) -> tuple[jax.Array, jax.Array]:
    """Shared experts plus each token's routed experts.

    Args:
      params: the values of `moe_parameters`; of "experts" what `routed` takes.
      x_BTD: normalised input.
      bias_E: float32; added to the scores for picking only, never for weighing.
      config: sizes.
      routed: brings tokens and experts together.

    Returns:
      [B, T, D] in x's dtype, and the load of each expert, its assignments, int32 [E].
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    choice_NK, weight_NK = route(params["router"], x_ND, bias_E, config)
    out_ND, load_E = routed(params["experts"], x_ND, choice_NK, weight_NK, config.experts)
    if config.shared:
        out_ND = out_ND + ffn(params["shared"], x_ND)
    return out_ND.reshape(x_BTD.shape), load_E


@jax.named_scope("router")
def route(
    router_DE: jax.Array, x_ND: jax.Array, bias_E: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array]:
    """Experts int32 [N, K] and their weights float32 [N, K], normalised to 1, times the scale.

    Nothing keeps logits from falling together, as weights of small scores are those of their
    ratios. Below `LEAST` they count as that: the gradient of the quotient has the square of the
    scores' sum, which float32 no longer holds from -44 on.
    """
    logits_NE = jnp.matmul(
        x_ND.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    scores_NE = jax.nn.sigmoid(jnp.maximum(logits_NE, LEAST))
    picking_NE = jax.lax.stop_gradient(scores_NE) + bias_E[None]
    _, choice_NK = jax.lax.top_k(picking_NE, config.top_k)
    picked_NK = jnp.take_along_axis(scores_NE, choice_NK, axis=1)
    total_N1 = jnp.sum(picked_NK, axis=1, keepdims=True) + 1e-20
    return choice_NK, config.scale * picked_NK / total_N1


def rebalanced(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """Loss-free balancing (arXiv 2408.15664): each bias moves by `rate` against its load.

    Loads are counts, int32, and are compared with their mean in integers: the sign of a rounding
    error would tell runs on different meshes apart.
    """
    total_L1 = jnp.sum(load_LE, axis=-1, keepdims=True)
    mean_L1 = total_L1 // load_LE.shape[-1]  # rounded down
    uneven_L1 = total_L1 % load_LE.shape[-1] != 0
    below_LE = (load_LE < mean_L1) | (uneven_L1 & (load_LE == mean_L1))
    above_LE = load_LE > mean_L1
    return bias_LE + rate * (below_LE.astype(jnp.float32) - above_LE.astype(jnp.float32))


class Groups(NamedTuple):
    """Where each assignment lies among the slots.

    Attributes:
      slot_NK: int32, the slot of each assignment.
      source_P: int32, the assignment in each slot; A in empty slots.
      padded_E: int32, slots of each expert, whole blocks.
      count_E: int32, assignments of each expert.
      expert_Q: int32, the expert of each block.
    """

    slot_NK: jax.Array
    source_P: jax.Array
    padded_E: jax.Array
    count_E: jax.Array
    expert_Q: jax.Array


def block_size(assignments: int, experts: int) -> int:
    """Slots of a block: about a quarter of an expert's even share, a power of two in 8..128."""
    share = max(1, assignments // (4 * experts))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def group(choice_NK: jax.Array, experts: int) -> Groups:
    """Lay the assignments out expert after expert, in the order of the tokens."""
    choice_A = choice_NK.reshape(-1)
    size = choice_A.size
    block = block_size(size, experts)
    blocks = min(-(-size // block) + experts, size)  # few assignments meet few experts
    sorted_A, order_A = jax.lax.sort_key_val(choice_A, jnp.arange(size, dtype=jnp.int32))
    count_E = jnp.bincount(choice_A, length=experts).astype(jnp.int32)
    padded_E = -(-count_E // block) * block
    shift_E = (jnp.cumsum(padded_E) - padded_E) - (jnp.cumsum(count_E) - count_E)
    slot_of_sorted_A = jnp.arange(size, dtype=jnp.int32) + shift_E[sorted_A]
    slot_A = jnp.zeros(size, jnp.int32).at[order_A].set(slot_of_sorted_A, unique_indices=True)
    source_P = jnp.full(blocks * block, size, jnp.int32)
    source_P = source_P.at[slot_of_sorted_A].set(
        order_A, unique_indices=True, indices_are_sorted=True)
    expert_Q = jnp.repeat(
        jnp.arange(experts, dtype=jnp.int32), padded_E // block, total_repeat_length=blocks)
    return Groups(slot_A.reshape(choice_NK.shape), source_P, padded_E, count_E, expert_Q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_slots(x_ND: jax.Array, groups: Groups, empty: str = "fill") -> jax.Array:
    """Each token at the slots of its K assignments, [P, D]; zeros in empty slots, or, with `empty`
    "clip", some token for which one there is no pass over all of them to make zeros."""
    return x_ND.at[groups.source_P // groups.slot_NK.shape[1]].get(mode=empty, fill_value=0)


@jax.custom_vjp
def from_slots(out_PD: jax.Array, groups: Groups) -> jax.Array:
    """The slot of each assignment, [N, K, D]."""
    return out_PD.at[groups.slot_NK].get(mode="promise_in_bounds")


def _to_slots_backward(empty: str, groups: Groups, grad_PD: jax.Array) -> tuple[jax.Array, None]:
    del empty
    return added_up(grad_PD, groups.slot_NK), None


def _from_slots_backward(groups: Groups, grad_NKD: jax.Array) -> tuple[jax.Array, None]:
    grad_AD = grad_NKD.reshape(-1, grad_NKD.shape[-1])
    return grad_AD.at[groups.source_P].get(mode="fill", fill_value=0), None


# Both are bijections between assignments and filled slots, so the gradient is a gather by the
# inverse: no scatter, no atomics, the same bits each run.
to_slots.defvjp(lambda x, groups, empty: (to_slots(x, groups, empty), groups), _to_slots_backward)
from_slots.defvjp(lambda out, groups: (from_slots(out, groups), groups), _from_slots_backward)


@jax.custom_vjp
def _of_choices(out_PD: jax.Array, groups: Groups) -> jax.Array:
    """The slots of each token's assignments, added up, [N, D]: the transpose of `to_slots`, whose
    empty slots nobody reads."""
    return added_up(out_PD, groups.slot_NK)


_of_choices.defvjp(lambda out, groups: (_of_choices(out, groups), groups),
                   lambda groups, grad_ND: (to_slots(grad_ND, groups, "clip"), None))


@jax.custom_vjp
def slot_weights(weight_NK: jax.Array, source_P: jax.Array, slot_NK: jax.Array) -> jax.Array:
    """The weight of each slot's assignment, [P]; 0 where `source_P` says A, and no gradient where
    `slot_NK` says P: an assignment may have no slot."""
    return weight_NK.reshape(-1).at[source_P].get(mode="fill", fill_value=0)


slot_weights.defvjp(
    lambda weight, source, slot: (slot_weights(weight, source, slot), slot),
    lambda slot_NK, grad_P: (grad_P.at[slot_NK].get(mode="fill", fill_value=0), None, None))


def added_up(rows_PD: jax.Array, slot_NK: jax.Array) -> jax.Array:
    """For each token the sum of its choices' rows, in float32 and then in theirs, [N, D]; places
    after the last row have zeros.

    One choice after another, so that [N, K, D] need not be in memory. On TPUs the sum is: libtpu
    made it a part of the products that read it, and added up for each of their tiles anew.
    """
    choices = (rows_PD.at[slot_N].get(mode="fill", fill_value=0).astype(jnp.float32)
               for slot_N in slot_NK.T)
    return jax.lax.platform_dependent(
        functools.reduce(jnp.add, choices).astype(rows_PD.dtype),
        tpu=jax.lax.optimization_barrier, default=lambda sum_ND: sum_ND)


def grouped_ffn(
    experts: Params, x_PD: jax.Array, groups: Groups, weight_P: jax.Array | None = None
) -> jax.Array:
    """The gated FFN of each slot's expert, [P, D]; times `weight_P`, float32, if there is one."""
    def times(x_PD: jax.Array, weight_EDF: jax.Array) -> jax.Array:
        return ragged_product(x_PD, weight_EDF, groups.padded_E, groups.expert_Q)

    # Slots after the last expert's may be anything in what a kernel gives, not in what it is given.
    used_P = jnp.arange(x_PD.shape[0]) < jnp.sum(groups.padded_E)
    gate_PF, up_PF = (jnp.where(used_P[:, None], times(x_PD, experts[name]), 0)
                      for name in ("gate", "up"))
    hidden_PF = jax.nn.silu(gate_PF) * up_PF
    if weight_P is not None:
        hidden_PF = (hidden_PF.astype(jnp.float32) * weight_P[:, None]).astype(x_PD.dtype)
    return times(hidden_PF, experts["down"])
