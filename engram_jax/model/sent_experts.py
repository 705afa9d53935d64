"""Expert parallelism: tokens travel to their experts, and not experts to every token.

The devices of one mesh axis share the experts among them, in their order. Each device lays its
assignments (token, choice) out expert after expert, so what a peer is to do for it is one stretch
of them, and what comes back for each travels by all_to_all. Tokens reach their experts in one of
two ways: with their assignments, once for each, or, where a token picks experts of most peers
anyhow, once and to everybody. Shapes are static: a round does C assignments of each peer, and where
somebody has more, all do further rounds, a quarter of that each. Nothing is dropped, and every
token gets what it would get from a device that had all experts.

The owner of an expert weighs its hidden units. So no gradient asks for what came back, and a
backward pass that computes anew what it needs sends tokens once more, and no results.

Runs inside `jax.shard_map`.

Shapes: N tokens, K choices, A = N K assignments, P peers, C assignments of each peer in a round,
S = P C of all, T tokens that have come, R rows of the experts' FFN, D width, E experts, X experts
of one device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from engram_jax.model import moe
from engram_jax.model.layers import Params

ROOM = 1.125  # over the even share of a device's assignments
FURTHER = 4  # a further round has room for one in so many of the first


def pays_to_all(choices: int, devices: int, block: Sequence[int]) -> bool:
    """Shall a token go once to all, and not once for each of its choices?

    Where every two devices have a link of their own, if that is less to send. In a block of a slice
    what goes from all to all passes through the middle of the longest axis, a quarter of its chips
    times as much as a device sends, and what goes to all takes the links of all axes.

    Args:
      choices: of a token.
      devices: that share the experts.
      block: how many of them lie along each axis of a slice; () where every two have a link.
    """
    if not block:
        return ROOM * choices >= devices
    return ROOM * choices * max(block) * len(block) >= 4 * (devices - 1)


class Way(NamedTuple):
    """How a device's assignments reach their experts.

    Attributes:
      place_A: int32, the place of each assignment among those of its peer.
      peer_A: int32, that peer.
      order_A: int32, the assignments, expert after expert.
      expert_A: int32, their experts.
      begin_P: int32, where each peer's stretch of them begins.
      count_P: int32, its length.
      most: int32 scalar, the longest stretch of all devices.
    """

    place_A: jax.Array
    peer_A: jax.Array
    order_A: jax.Array
    expert_A: jax.Array
    begin_P: jax.Array
    count_P: jax.Array
    most: jax.Array


class Round(NamedTuple):
    """One round: what this device sends, and as an owner of experts has to do.

    Attributes:
      slot_NK: int32, where each assignment lies among those that leave, [P, C] in a row (S if it is
        of another round).
      source_S: int32, the assignment in each of these places (A in empty ones).
      token_R: int32, of each row of the FFN its token among those that have come (T in empty ones).
      row_S: int32, of each assignment that has come its row (R in empty ones).
      groups: the rows.
    """

    slot_NK: jax.Array
    source_S: jax.Array
    token_R: jax.Array
    row_S: jax.Array
    groups: moe.Groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentExperts:
    """The `moe.Routed` of devices that share the experts.

    Attributes:
      axis: mesh axis along which they are shared.
      devices: along that axis.
      everywhere: all mesh axes; devices agree on the number of rounds.
      to_all: a token travels once, to all peers, and not with each of its assignments.
      room: assignments of each peer in the first round, over the even share of a device's.
    """

    axis: str
    devices: int
    everywhere: tuple[str, ...]
    to_all: bool
    room: float = ROOM

    def __call__(
        self, experts: Params, x_ND: jax.Array, choice_NK: jax.Array, weight_NK: jax.Array,
        number: int,
    ) -> tuple[jax.Array, jax.Array]:
        """`experts` are this device's own: matrices [X, in, out], X = ceil(E / P), multiplied in
        x's dtype; their gradients have their own."""
        out_ND = _rounds(self, experts, x_ND, weight_NK, self.way(choice_NK, number))
        load_E = jnp.bincount(choice_NK.reshape(-1), length=number).astype(jnp.int32)
        return out_ND, load_E

    def way(self, choice_NK: jax.Array, number: int) -> Way:
        """Lay the assignments out, and find who has most for a peer."""
        each, choice_A = -(-number // self.devices), choice_NK.reshape(-1)
        iota_A = jnp.arange(choice_A.size, dtype=jnp.int32)
        expert_A, order_A = jax.lax.sort_key_val(choice_A, iota_A)
        first_P = jnp.arange(self.devices, dtype=jnp.int32) * each
        begin_P = jnp.searchsorted(expert_A, first_P).astype(jnp.int32)
        count_P = jnp.searchsorted(expert_A, first_P + each).astype(jnp.int32) - begin_P
        peer_A = choice_A // each
        sorted_A = jnp.zeros_like(iota_A).at[order_A].set(iota_A, unique_indices=True)
        return Way(sorted_A - begin_P[peer_A], peer_A, order_A, expert_A % each, begin_P, count_P,
                   jax.lax.pmax(jnp.max(count_P), self.everywhere))

    def capacity(self, assignments: int) -> int:
        """C of the first round: whole rows of eight, as a TPU keeps them, and no more than there
        are."""
        share = math.ceil(self.room * assignments / self.devices)
        return min(-(-share // 8) * 8, assignments)

    def further(self, assignments: int) -> int:
        """C of each further round."""
        return -(-self.capacity(assignments) // (8 * FURTHER)) * 8

    def rounds(self, way: Way) -> jax.Array:
        """How many all devices do, int32."""
        size = way.order_A.size
        return 1 + jnp.maximum(way.most - self.capacity(size) + self.further(size) - 1,
                               0) // self.further(size)

    def round(
        self, experts: Params, x_ND: jax.Array, weight_NK: jax.Array, way: Way,
        number: jax.Array | int,
    ) -> jax.Array:
        """What the assignments of one round get from their experts, [N, D].

        Args:
          experts, x_ND, weight_NK: as in a call.
          way: laid out.
          number: of the round; 0 itself, or an array for one of the others.
        """
        here = self._round(way, number, weight_NK.shape, experts["gate"].shape[0])
        weight_S = self._swap(moe.slot_weights(weight_NK, here.source_S, here.slot_NK))
        weight_R = moe.to_slots(weight_S[:, None], here.groups)[:, 0]
        out_RD = moe.grouped_ffn(experts, _sent(self, x_ND, here), here.groups, weight_R)
        return _received(self, out_RD, here)

    def _round(
        self, way: Way, number: jax.Array | int, shape: tuple[int, ...], each: int
    ) -> Round:
        size = way.order_A.size
        first, further = self.capacity(size), self.further(size)
        start, room = (0, first) if isinstance(number, int) else (
            first + (number - 1) * further, further)
        mine_A = (way.place_A >= start) & (way.place_A < start + room)
        slot_A = jnp.where(mine_A, way.peer_A * room + way.place_A - start, self.devices * room)
        place_1C = start + jnp.arange(room, dtype=jnp.int32)[None]
        used_PC = place_1C < way.count_P[:, None]
        at_S = jnp.where(used_PC, way.begin_P[:, None] + place_1C, size).reshape(-1)
        source_S = way.order_A.at[at_S].get(mode="fill", fill_value=size)

        # As an owner: empty places are those of one more expert, which comes last and has no
        # matrix.
        expert_S = self._swap(way.expert_A.at[at_S].get(mode="fill", fill_value=each))
        groups = moe.group(expert_S[:, None], each + 1)
        row_S = jnp.where(expert_S < each, groups.slot_NK[:, 0], groups.source_P.size)
        if self.to_all:
            peer_S = jnp.repeat(jnp.arange(self.devices, dtype=jnp.int32), room)
            token_S, tokens = (peer_S * shape[0] + self._swap(source_S // shape[1]),
                               self.devices * shape[0])
        else:
            token_S, tokens = jnp.arange(source_S.size, dtype=jnp.int32), source_S.size
        token_S = jnp.where(expert_S < each, token_S, tokens)
        token_R = token_S.at[groups.source_P].get(mode="fill", fill_value=tokens)
        return Round(slot_A.reshape(shape), source_S, token_R, row_S,
                     groups._replace(padded_E=groups.padded_E[:each]))

    def _tokens(self, x_ND: jax.Array, here: Round) -> jax.Array:
        """The tokens that come to this device, [T, D]."""
        if self.to_all:
            return _row_by_row(jax.lax.all_gather(_row_by_row(x_ND), self.axis, tiled=True))
        token_S = here.source_S // here.slot_NK.shape[1]
        return self._swap(x_ND.at[token_S].get(mode="clip"))

    def _swap(self, slots: jax.Array) -> jax.Array:
        """What each peer has for this device, in the peers' order."""
        if self.devices == 1:
            return slots
        return jax.lax.all_to_all(slots, self.axis, 0, 0, tiled=True)


def _row_by_row(x_ND: jax.Array) -> jax.Array:
    """The same; in a TPU's memory row after row, as it is read and written.

    libtpu laid what is gathered out column after column, and copied it before anything read it.
    """
    return jax.lax.platform_dependent(
        x_ND, tpu=lambda x: with_layout_constraint(x, Layout((0, 1))), default=lambda x: x)


# Each of the two is the other's gradient, and both are gathers: the same bits each run.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sent(routed: SentExperts, x_ND: jax.Array, here: Round) -> jax.Array:
    """The token of each row, [R, D]; some token in empty rows, which weigh 0."""
    return routed._tokens(x_ND, here).at[here.token_R].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _received(routed: SentExperts, out_RD: jax.Array, here: Round) -> jax.Array:
    """What came back for each token, added up in float32, [N, D]."""
    out_SD = routed._swap(out_RD.at[here.row_S].get(mode="clip"))  # nobody reads empty places
    return moe.added_up(out_SD, here.slot_NK)


_sent.defvjp(lambda routed, x, here: (_sent(routed, x, here), here),
             lambda routed, here, grad_RD: (_received(routed, grad_RD, here), None))
_received.defvjp(lambda routed, out, here: (_received(routed, out, here), here),
                 lambda routed, here, grad_ND: (_sent(routed, grad_ND, here), None))


Given = tuple[Params, jax.Array, jax.Array]  # experts, tokens, weights: what has gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(
    routed: SentExperts, experts: Params, x_ND: jax.Array, weight_NK: jax.Array, way: Way
) -> jax.Array:
    """What all rounds give each token, [N, D]."""
    rounds, experts = routed.rounds(way), _as(x_ND.dtype, experts)

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, out_ND = carry
        return number + 1, out_ND + routed.round(experts, x_ND, weight_NK, way, number)

    def further(first_ND: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda carry: carry[0] < rounds, again, (jnp.int32(1), first_ND))[1]

    return _if_any(rounds, further, routed.round(experts, x_ND, weight_NK, way, 0))


def _rounds_forward(
    routed: SentExperts, experts: Params, x_ND: jax.Array, weight_NK: jax.Array, way: Way
) -> tuple[jax.Array, tuple[Given, Way, Params]]:
    """Matrices are kept as they are multiplied, beside arrays of nothing in their dtypes."""
    dtypes = jax.tree.map(lambda matrix: jnp.zeros(0, matrix.dtype), experts)
    experts = _as(x_ND.dtype, experts)
    return (_rounds(routed, experts, x_ND, weight_NK, way),
            ((experts, x_ND, weight_NK), way, dtypes))


def _rounds_backward(
    routed: SentExperts, saved: tuple[Given, Way, Params], grad_ND: jax.Array
) -> tuple[Params, jax.Array, jax.Array, None]:
    """Rounds are computed anew; gradients add up over them in float32."""
    given, way, dtypes = saved
    rounds = routed.rounds(way)

    def of(number: jax.Array | int) -> Given:
        # In their own dtypes here and not outside of a loop, so that the compiler sees both
        # conversions of the matrices and makes none.
        experts = jax.tree.map(lambda matrix, own: matrix.astype(own.dtype), given[0], dtypes)
        _, back = jax.vjp(lambda experts, x_ND, weight_NK: routed.round(
            experts, x_ND, weight_NK, way, number), experts, *given[1:])
        grads: Given = back(grad_ND)
        return grads

    def again(carry: tuple[jax.Array, Given]) -> tuple[jax.Array, Given]:
        number, sums = carry
        return number + 1, jax.tree.map(jnp.add, sums, _as(jnp.float32, of(number)))

    def further(first: Given) -> Given:
        _, sums = jax.lax.while_loop(
            lambda carry: carry[0] < rounds, again, (jnp.int32(1), _as(jnp.float32, first)))
        return jax.tree.map(lambda total, array: total.astype(array.dtype), sums, first)

    return *_if_any(rounds, further, of(0)), None


def _as(dtype: Any, tree: Any) -> Any:
    return jax.tree.map(lambda array: array.astype(dtype), tree)


def _if_any(rounds: jax.Array, further: Callable[[Any], Any], first: Any) -> Any:
    """`further` of the first round's, if there are more.

    A loop alone would do, but XLA copies what a loop reads, matrices of experts for one, before it
    knows whether the loop runs at all.
    """
    return jax.lax.cond(rounds > 1, further, lambda first: first, first)


_rounds.defvjp(_rounds_forward, _rounds_backward)
