"""Expert parallelism: tokens travel to their experts, and not experts to every token.

The devices of one mesh axis share the experts among them, in their order. Each device lays its
assignments (token, choice) out expert after expert, so what goes to a peer is one stretch of them;
stretches travel by all_to_all, meet their experts, and travel back. Shapes are static: a round
takes C assignments to each peer, and where somebody has more, all do another round. Nothing is
dropped, and every token gets what it would get from a device that had all experts.

The owner of an expert weighs its hidden units. So no gradient asks for what came back, and a
backward pass that computes anew what it needs sends tokens once more, and no results.

Runs inside `jax.shard_map`.

Shapes: N tokens, K choices, A = N K assignments, P peers, C assignments to each peer in a round,
D width, E experts, X experts of one device.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.model import moe
from engram_jax.model.layers import Params

ROOM = 1.25  # over the even share of a device's assignments


class Way(NamedTuple):
    """How a device's assignments reach their experts.

    Attributes:
      place_A: int32, the place of each assignment among those of its peer.
      peer_A: int32, that peer.
      order_A: int32, the assignments, expert after expert.
      expert_A: int32, their experts.
      begin_P: int32, where each peer's stretch of them begins.
      count_P: int32, its length.
      rounds: int32 scalar, how many all devices do.
    """

    place_A: jax.Array
    peer_A: jax.Array
    order_A: jax.Array
    expert_A: jax.Array
    begin_P: jax.Array
    count_P: jax.Array
    rounds: jax.Array


class Round(NamedTuple):
    """One round: slot_NK int32, where each assignment lies among P * C slots (P * C if it is of
    another round); source_S int32, the assignment in each slot (A in empty ones); expert_S int32,
    its expert by the number that its owner gives it (X in empty ones)."""

    slot_NK: jax.Array
    source_S: jax.Array
    expert_S: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentExperts:
    """The `moe.Routed` of devices that share the experts.

    Attributes:
      axis: mesh axis along which they are shared.
      devices: along that axis.
      everywhere: all mesh axes; devices agree on the number of rounds.
      room: assignments to each peer in a round, over the even share of a device's.
    """

    axis: str
    devices: int
    everywhere: tuple[str, ...]
    room: float = ROOM

    def __call__(
        self, experts: Params, x_ND: jax.Array, choice_NK: jax.Array, weight_NK: jax.Array,
        number: int,
    ) -> tuple[jax.Array, jax.Array]:
        """`experts` are this device's own: matrices [X, in, out], X = ceil(E / P)."""
        out_ND = _rounds(self, experts, x_ND, weight_NK, self.way(choice_NK, number))
        load_E = jnp.bincount(choice_NK.reshape(-1), length=number).astype(jnp.int32)
        return out_ND, load_E

    def way(self, choice_NK: jax.Array, number: int) -> Way:
        """Lay the assignments out, and agree on the rounds."""
        each, choice_A = -(-number // self.devices), choice_NK.reshape(-1)
        iota_A = jnp.arange(choice_A.size, dtype=jnp.int32)
        expert_A, order_A = jax.lax.sort_key_val(choice_A, iota_A)
        first_P = jnp.arange(self.devices, dtype=jnp.int32) * each
        begin_P = jnp.searchsorted(expert_A, first_P).astype(jnp.int32)
        count_P = jnp.searchsorted(expert_A, first_P + each).astype(jnp.int32) - begin_P
        peer_A = choice_A // each
        sorted_A = jnp.zeros_like(iota_A).at[order_A].set(iota_A, unique_indices=True)
        most = jax.lax.pmax(jnp.max(count_P), self.everywhere)
        rounds = -(-most // self.capacity(choice_A.size))
        return Way(sorted_A - begin_P[peer_A], peer_A, order_A, expert_A % each, begin_P, count_P,
                   rounds)

    def capacity(self, assignments: int) -> int:
        """C: whole rows of eight, as a TPU keeps them, and no more than there are."""
        share = math.ceil(self.room * assignments / self.devices)
        return min(-(-share // 8) * 8, assignments)

    def _round(
        self, experts: Params, x_ND: jax.Array, weight_NK: jax.Array, way: Way, number: jax.Array
    ) -> jax.Array:
        """What the assignments of one round get from their experts, [N, D]."""
        here = self._slots(way, number, weight_NK.shape, experts["gate"].shape[0])
        got_SD, expert_S = self._swap(_sent(x_ND, here)), self._swap(here.expert_S)
        weight_S = self._swap(_weights(weight_NK, here))
        return _received(self._swap(_own(experts, got_SD, expert_S, weight_S)), here)

    def _slots(self, way: Way, number: jax.Array, shape: tuple[int, ...], each: int) -> Round:
        size = way.order_A.size
        capacity = self.capacity(size)
        start = number * capacity
        mine_A = (way.place_A >= start) & (way.place_A < start + capacity)
        slot_A = jnp.where(mine_A, way.peer_A * capacity + way.place_A - start,
                           self.devices * capacity)
        place_1C = start + jnp.arange(capacity, dtype=jnp.int32)[None]
        used_PC = place_1C < way.count_P[:, None]
        at_S = jnp.where(used_PC, way.begin_P[:, None] + place_1C, size).reshape(-1)
        source_S = way.order_A.at[at_S].get(mode="fill", fill_value=size)
        expert_S = way.expert_A.at[at_S].get(mode="fill", fill_value=each)
        return Round(slot_A.reshape(shape), source_S, expert_S)

    def _swap(self, slots: jax.Array) -> jax.Array:
        """What each peer has for this device, in the peers' order."""
        if self.devices == 1:
            return slots
        return jax.lax.all_to_all(slots, self.axis, 0, 0, tiled=True)


def _own(
    experts: Params, x_SD: jax.Array, expert_S: jax.Array, weight_S: jax.Array
) -> jax.Array:
    """The weighed FFN of each slot's expert, one of this device's; zeros in empty slots."""
    each = experts["gate"].shape[0]
    # Empty slots are those of one more expert, which comes last and has no matrix.
    groups = moe.group(expert_S[:, None], each + 1)
    weight_P1, mine = (moe.to_slots(weight_S[:, None], groups),
                       groups._replace(padded_E=groups.padded_E[:each]))
    out_PD = moe.grouped_ffn(experts, moe.to_slots(x_SD, groups), mine, weight_P1[:, 0])
    return jnp.where((expert_S < each)[:, None], moe.from_slots(out_PD, groups)[:, 0], 0)


# Each of the two is the other's gradient, and both are gathers: the same bits each run.


@jax.custom_vjp
def _sent(x_ND: jax.Array, here: Round) -> jax.Array:
    """Each slot's token, [S, D]; zeros in empty slots."""
    return x_ND.at[here.source_S // here.slot_NK.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _received(out_SD: jax.Array, here: Round) -> jax.Array:
    """What came back for each token, added up in float32, [N, D]."""
    out_NKD = out_SD.at[here.slot_NK].get(mode="fill", fill_value=0)
    return jnp.sum(out_NKD, axis=1, dtype=jnp.float32).astype(out_SD.dtype)


_sent.defvjp(lambda x, here: (_sent(x, here), here),
             lambda here, grad_SD: (_received(grad_SD, here), None))
_received.defvjp(lambda out, here: (_received(out, here), here),
                 lambda here, grad_ND: (_sent(grad_ND, here), None))


@jax.custom_vjp
def _weights(weight_NK: jax.Array, here: Round) -> jax.Array:
    """Each slot's weight, [S]; 0 in empty slots."""
    return weight_NK.reshape(-1).at[here.source_S].get(mode="fill", fill_value=0)


_weights.defvjp(
    lambda weight, here: (_weights(weight, here), here),
    lambda here, grad_S: (grad_S.at[here.slot_NK].get(mode="fill", fill_value=0), None))


Given = tuple[Params, jax.Array, jax.Array]  # experts, tokens, weights: what has gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(
    routed: SentExperts, experts: Params, x_ND: jax.Array, weight_NK: jax.Array, way: Way
) -> jax.Array:
    """What all rounds give each token, [N, D]."""

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, out_ND = carry
        return number + 1, out_ND + routed._round(experts, x_ND, weight_NK, way, number)

    first_ND = routed._round(experts, x_ND, weight_NK, way, jnp.int32(0))
    return jax.lax.while_loop(
        lambda carry: carry[0] < way.rounds, again, (jnp.int32(1), first_ND))[1]


def _rounds_backward(
    routed: SentExperts, saved: tuple[Given, Way], grad_ND: jax.Array
) -> tuple[Params, jax.Array, jax.Array, None]:
    """Rounds are computed anew; gradients add up over them in float32."""
    given, way = saved

    def of(number: jax.Array) -> Given:
        _, back = jax.vjp(lambda experts, x_ND, weight_NK: routed._round(
            experts, x_ND, weight_NK, way, number), *given)
        return jax.tree.map(lambda grad: grad.astype(jnp.float32), back(grad_ND))

    def again(carry: tuple[jax.Array, Given]) -> tuple[jax.Array, Given]:
        number, sums = carry
        return number + 1, jax.tree.map(jnp.add, sums, of(number))

    _, sums = jax.lax.while_loop(
        lambda carry: carry[0] < way.rounds, again, (jnp.int32(1), of(jnp.int32(0))))
    grads = jax.tree.map(lambda total, array: total.astype(array.dtype), sums, given)
    return *grads, None


_rounds.defvjp(
    lambda routed, experts, x, weight, way: (
        _rounds(routed, experts, x, weight, way), ((experts, x, weight), way)),
    _rounds_backward)
