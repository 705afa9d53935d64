"""Row ids to rows, and gradients of rows to gradients of the distinct rows behind them.

A table `[S, R, D]` lies spread over P devices along its shards. Each device sorts the ids that it
needs and keeps one of each; the distinct ids travel to their owners and the rows come back
(all_to_all both times). Gradients go the same way: summed over the repeats where they arose, sent
to the owner, summed there over the devices. Every sum is in float32 and in a fixed order.

Shapes are static: a device asks each peer for at most C rows in a round. When somebody needs more,
all devices do another round. A round ends at a row that all agree on, so that every gradient of a
row reaches its owner in the same round, and an optimizer meets each row once a step.

Everything here runs inside `jax.shard_map` over the axes of `Exchange.axes`, on what one device
holds; `tables.memory` wraps it for callers outside. One device needs no axes and no shard_map.

Shapes: N ids asked for (with repeats), U slots for distinct rows, P devices, C rows asked of each
peer in a round, D columns, S shards, R rows of a shard.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from engram_jax.config import require
from engram_jax.tables import collectives
from engram_jax.tables.layout import TableLayout

UNUSED = jnp.iinfo(jnp.int32).max
ROOM = 1.25  # over the even share of ids, of which text repeats a third to a half
Carry = TypeVar("Carry")


class UniqueRows(NamedTuple):
    """Distinct row ids with what belongs to each.

    Attributes:
      ids_U: int32, ascending, in the table (or the device's part of it) that is to be updated;
        unused slots hold an id that no table has.
      grads_UD: float32, the sum over every occurrence of the id; 0 in unused slots.
      used: int32 scalar, how many slots are used.
      global_U: int32, the same rows by their ids in the whole table, whatever the mesh.
    """

    ids_U: jax.Array
    grads_UD: jax.Array
    used: jax.Array
    global_U: jax.Array


class Window(NamedTuple):
    """What a device asks for in one round: the slots begin_P..end_P-1 of each peer.

    keys_PC are the rows in those slots (UNUSED behind them); `more` is true, on all devices alike,
    when somebody needs rows behind this round.
    """

    begin_P: jax.Array
    end_P: jax.Array
    keys_PC: jax.Array
    more: jax.Array


class Route(NamedTuple):
    """Where the rows of one set of ids come from.

    A row's key counts the rows of the table shard after shard. So keys are ordered by owner, and
    what is left of one after the keys of the owners before is the local row in the owner's part.

    Attributes:
      order_N: int32, the stable order that sorts the ids by key.
      slot_N: int32, the slot of each id in that order.
      keys_U: int32, the distinct keys in their slots, ascending; UNUSED behind them.
      first: the first round.
      asked_PC: int32, the keys that each peer asks of this device in the first round.
      outside: int32 scalar, how many of the ids are in no row of the table.
    """

    order_N: jax.Array
    slot_N: jax.Array
    keys_U: jax.Array
    first: Window
    asked_PC: jax.Array
    outside: jax.Array


class FetchedRows(NamedTuple):
    """The rows that were asked for, and what fetching them took.

    Attributes:
      rows: ids.shape + (D,), as the table stores them.
      unique: int32 scalar, how many distinct rows this device asked for.
      overflow: int32 scalar, how many of them came after the first round.
      rounds: int32 scalar, how many rounds it took.
    """

    rows: jax.Array
    unique: jax.Array
    overflow: jax.Array
    rounds: jax.Array


class RowGradients(NamedTuple):
    """Gradients of distinct rows on their way to the rows' owners.

    Attributes:
      route: the way that they take.
      grads_UD: float32, this device's sum for each of the slots of `route`.
      first: the first round's rows at their owner.
      square: float32 scalar, the squares of the complete gradients of all rows that this device
        owns, summed.
      touched: int32 scalar, how many rows of this device's part have a gradient.
    """

    route: Route
    grads_UD: jax.Array
    first: UniqueRows
    square: jax.Array
    touched: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """The exchange of one table.

    Attributes:
      layout: the layout of the whole table.
      axes: mesh axes over which the shards are spread; none for one device.
      devices: how many devices they span; divides `layout.shards`.
      near: how many of them lie together (`collectives.neighbours`).
      capacity: rows asked of each peer in a round; 0 is 1.25 times the even share of the ids.

    Raises:
      UserError: no axes for several devices, or they do not divide the shards; when it is used,
        axes that are not those of the `jax.shard_map` around, or arrays of another shape.
    """

    layout: TableLayout
    axes: tuple[str, ...] = ()
    devices: int = 1
    near: int = 0
    capacity: int = 0

    def __post_init__(self) -> None:
        self.layout.check_divides(self.devices)
        require(self.devices == 1 or bool(self.axes), "Exchange.axes", self.axes,
                f"must name the mesh axes that {self.devices} devices span")
        require(self.capacity >= 0, "Exchange.capacity", self.capacity, "must not be negative")

    @property
    def part(self) -> TableLayout:
        """The layout of one device's part, a table of its own."""
        return self.layout.part(self.devices)

    def demand(self, ids: jax.Array) -> jax.Array:
        """How many distinct rows this device needs of each peer, int32 [P]."""
        _, keys_U = distinct(jnp.sort(self._keys(ids.reshape(-1))))
        begin_P = jnp.searchsorted(keys_U, self._first_keys())
        last_P = self._first_keys() + (self.part.rows - 1)
        return (jnp.searchsorted(keys_U, last_P, side="right") - begin_P).astype(jnp.int32)

    def route(self, ids: jax.Array) -> Route:
        """Sort, keep one of each, and tell the owners what is asked of them first.

        Args:
          ids: int32, any shape; ids of no row are counted and lead nowhere.
        """
        self._check_axes()
        require(bool(jnp.issubdtype(ids.dtype, jnp.integer)), "ids.dtype", str(ids.dtype),
                "must be a whole-number type")
        key_N = self._keys(ids.reshape(-1))
        size = key_N.size
        sorted_N, order_N = jax.lax.sort_key_val(key_N, jnp.arange(size, dtype=jnp.int32))
        slot_N, keys_U = distinct(sorted_N)
        begin_P = jnp.searchsorted(keys_U, self._first_keys()).astype(jnp.int32)
        first = self._window(keys_U, begin_P)
        outside = jnp.sum(key_N == UNUSED, dtype=jnp.int32)
        return Route(order_N, slot_N, keys_U, first, self._swap(first.keys_PC), outside)

    def lookup(self, table_SRD: jax.Array, ids: jax.Array, route: Route) -> FetchedRows:
        """Rows for `ids` in the table's dtype; zeros for ids of no row.

        Args:
          table_SRD: this device's part.
          ids: what `route` was made of.
        """
        require(table_SRD.shape == self.part.shape, "table.shape", table_SRD.shape,
                f"must be {self.part.shape}, what one of {self.devices} devices holds")
        require(ids.size == route.order_N.size, "ids.shape", ids.shape,
                f"must be the {route.order_N.size} ids of the route")
        unique = jnp.sum(route.keys_U != UNUSED, dtype=jnp.int32)
        one = jnp.int32(1)
        if self.devices == 1:
            return FetchedRows(self.layout.gather(table_SRD, ids), unique, one * 0, one)
        asking_N = jnp.zeros_like(route.slot_N).at[route.order_N].set(
            route.slot_N, unique_indices=True)

        def fetch(window: Window, asked_PC: jax.Array) -> tuple[jax.Array, jax.Array]:
            sent_PCD = self.part.gather(table_SRD, self._local(asked_PC))
            got_PCD = self._swap(sent_PCD)
            arrival_N = self._arrival(route.keys_U, asking_N, window)
            flat = got_PCD.reshape(-1, *got_PCD.shape[2:])
            return arrival_N, flat.at[arrival_N].get(mode="fill", fill_value=0)

        def again(carry: tuple) -> tuple:
            window, rows_ND, rounds = carry
            window = self._window(route.keys_U, window.end_P)
            arrival_N, got_ND = fetch(window, self._swap(window.keys_PC))
            here_N1 = (arrival_N < window.keys_PC.size)[:, None]
            return window, jnp.where(here_N1, got_ND, rows_ND), rounds + 1

        _, rows_ND = fetch(route.first, route.asked_PC)
        _, rows_ND, rounds = jax.lax.while_loop(
            lambda carry: carry[0].more, again, (route.first, rows_ND, one))
        served = jnp.sum(route.first.end_P - route.first.begin_P, dtype=jnp.int32)
        rows = rows_ND.reshape(*ids.shape, *rows_ND.shape[1:])
        return FetchedRows(rows, unique, unique - served, rounds)

    def combine(self, route: Route, grads_ND: jax.Array) -> RowGradients:
        """Sum the gradients of equal ids here, then at their owners, who learn the norm.

        Args:
          route: that of the look-up.
          grads_ND: the gradients of the rows that were looked up, in the order of their ids.
        """
        right = (route.order_N.size, self.layout.dim)
        require(grads_ND.shape == right, "grads.shape", grads_ND.shape,
                f"must be {right}, one gradient for each id of the route")
        grads_UD = jax.ops.segment_sum(
            grads_ND[route.order_N].astype(jnp.float32), route.slot_N,
            num_segments=route.slot_N.size, indices_are_sorted=True)
        used_U = route.keys_U != UNUSED
        grads_UD = jnp.where(used_U[:, None], grads_UD, 0)
        first = self._arrived(route.asked_PC, grads_UD, route.first)

        def again(carry: tuple) -> tuple:
            window, square, touched = carry
            window = self._window(route.keys_U, window.end_P)
            rows = self._arrived(self._swap(window.keys_PC), grads_UD, window)
            return window, square + jnp.sum(rows.grads_UD**2), touched + rows.used

        sums = route.first, jnp.sum(first.grads_UD**2), first.used
        if self.devices > 1:
            sums = jax.lax.while_loop(lambda carry: carry[0].more, again, sums)
        return RowGradients(route, grads_UD, first, sums[1], sums[2])

    def agrees(self, route: Route) -> jax.Array:
        """Whether every row reaches the device that owns it, bool, the same on all devices.

        Over all rounds the owners add up what they are asked for: how many keys, their sum and the
        sum of their squares, which must be those of the askers; and no key may be another's.
        """
        if self.devices == 1:
            return jnp.bool_(True)

        def heard(asked_PC: jax.Array) -> jax.Array:
            used_PC, mine = asked_PC != UNUSED, asked_PC // self.part.rows == self._me()
            return jnp.append(_sums(asked_PC), jnp.sum(used_PC & ~mine, dtype=jnp.uint32))

        def again(carry: tuple[Window, jax.Array]) -> tuple[Window, jax.Array]:
            window = self._window(route.keys_U, carry[0].end_P)
            return window, carry[1] + heard(self._swap(window.keys_PC))

        _, owners = jax.lax.while_loop(
            lambda carry: carry[0].more, again, (route.first, heard(route.asked_PC)))
        askers = jnp.append(_sums(route.keys_U), jnp.uint32(0))
        return jnp.all(jax.lax.psum(owners - askers, self.axes) == 0)

    def update(
        self, gradients: RowGradients, carry: Carry, move: Callable[[Carry, UniqueRows], Carry]
    ) -> Carry:
        """Give each round's rows in turn to `move`, (carry, rows) -> carry. No row comes twice.

        The carry (a table and its optimizer's state) is updated in place where it is donated.
        """
        carry = move(carry, gradients.first)
        if self.devices == 1:
            return carry
        route = gradients.route

        def again(state: tuple[Window, Carry]) -> tuple[Window, Carry]:
            window = self._window(route.keys_U, state[0].end_P)
            asked_PC = self._swap(window.keys_PC)
            return window, move(state[1], self._arrived(asked_PC, gradients.grads_UD, window))

        return jax.lax.while_loop(lambda state: state[0].more, again, (route.first, carry))[1]

    def _check_axes(self) -> None:
        """Refuse axes that are not those of the `jax.shard_map` around (UserError)."""
        mesh = jax.sharding.get_abstract_mesh()
        manual = {axis: mesh.shape[axis] for axis in mesh.manual_axes}
        around = f"the jax.shard_map around it has {manual}" if manual else (
            "there is no jax.shard_map around it")
        if not self.axes:
            require(math.prod(manual.values()) == 1, "Exchange.axes", self.axes,
                    f"{around}, and each device would have a table of its own")
        elif self.devices > 1 or manual:
            require(set(self.axes) <= set(manual), "Exchange.axes", self.axes, around)
            require(math.prod(manual[axis] for axis in self.axes) == self.devices,
                    "Exchange.devices", self.devices, around)

    def _capacity(self, ids: int) -> int:
        """Rows asked of each peer in a round of a look-up of so many ids."""
        return self.capacity or min(
            math.ceil(ROOM * ids / self.devices), self.part.rows)

    def _keys(self, ids_N: jax.Array) -> jax.Array:
        """The keys of rows; UNUSED for ids of no row."""
        return jnp.where(self.layout.holds(ids_N), self.layout.key(ids_N), UNUSED)

    def _first_keys(self) -> jax.Array:
        return jnp.arange(self.devices, dtype=jnp.int32) * self.part.rows

    def _local(self, keys: jax.Array) -> jax.Array:
        """Ids within this device's part of keys that it owns; UNUSED stays so."""
        return jnp.where(keys == UNUSED, UNUSED, keys - self._me() * self.part.rows)

    def _me(self) -> jax.Array:
        return jax.lax.axis_index(self.axes) if self.devices > 1 else jnp.int32(0)

    def _global(self, local_U: jax.Array) -> jax.Array:
        """Ids in the whole table of ids in this device's part."""
        ids_U = self.layout.row_id(local_U + self._me() * self.part.rows)
        return jnp.where(local_U == UNUSED, UNUSED, ids_U)

    def _window(self, keys_U: jax.Array, begin_P: jax.Array) -> Window:
        """The round that begins at these slots."""
        if self.devices == 1:
            end_P = jnp.sum(keys_U != UNUSED, dtype=jnp.int32)[None]
            return Window(begin_P, end_P, keys_U[None], jnp.bool_(False))
        # The last part's end would pass int32 for a table of nearly 2**31 rows.
        last_P = self._first_keys() + (self.part.rows - 1)
        capacity = self._capacity(keys_U.size)
        next_P = keys_U.at[begin_P + capacity].get(mode="fill", fill_value=UNUSED)
        # All of a peer's keys up to and with `until` fit into everybody's round.
        until_P = jax.lax.pmin(jnp.minimum(next_P - 1, last_P), self.axes)
        end_P = jnp.searchsorted(keys_U, until_P, side="right").astype(jnp.int32)
        slot_PC = begin_P[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
        keys_PC = keys_U.at[slot_PC].get(mode="fill", fill_value=UNUSED)
        keys_PC = jnp.where(slot_PC < end_P[:, None], keys_PC, UNUSED)
        return Window(begin_P, end_P, keys_PC, jnp.any(until_P < last_P))

    def _arrival(self, keys_U: jax.Array, asking_N: jax.Array, window: Window) -> jax.Array:
        """For each id, where its row lies among the P * C of this round; P * C if nowhere."""
        owner_U = jnp.minimum(keys_U // self.part.rows, self.devices - 1)
        owner_N = owner_U[asking_N]
        here_N = (asking_N >= window.begin_P[owner_N]) & (asking_N < window.end_P[owner_N])
        arrival_N = owner_N * window.keys_PC.shape[1] + asking_N - window.begin_P[owner_N]
        return jnp.where(here_N, arrival_N, window.keys_PC.size)

    def _arrived(
        self, asked_PC: jax.Array, grads_UD: jax.Array, window: Window
    ) -> UniqueRows:
        """One round's gradients at their owner, added up over the devices in their order."""
        if self.devices == 1:
            keys_U = asked_PC[0]
            return UniqueRows(keys_U, grads_UD, window.end_P[0], self._global(keys_U))
        slot_PC = window.begin_P[:, None] + jnp.arange(asked_PC.shape[1], dtype=jnp.int32)[None]
        slot_PC = jnp.where(window.keys_PC == UNUSED, grads_UD.shape[0], slot_PC)
        sent_PCD = grads_UD.at[slot_PC].get(mode="fill", fill_value=0)
        got_PCD = self._swap(sent_PCD)
        rows = combine(self._local(asked_PC).reshape(-1), got_PCD.reshape(-1, got_PCD.shape[-1]))
        return rows._replace(global_U=self._global(rows.ids_U))

    def _swap(self, send: jax.Array) -> jax.Array:
        """What each peer holds for this device, in the peers' order; the leading axis is P."""
        if self.devices == 1:
            return send
        return collectives.all_to_all(send, self.axes, self.near)


def _sums(keys: jax.Array) -> jax.Array:
    """How many keys are used, their sum and the sum of their squares, uint32 modulo 2**32."""
    used = keys != UNUSED
    number = jnp.where(used, keys, 0).astype(jnp.uint32)
    return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in (used, number, number * number)])


def distinct(sorted_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slot of each of the sorted keys, and the distinct keys in their slots (UNUSED behind)."""
    first_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    slot_N = jnp.cumsum(first_N, dtype=jnp.int32) - 1
    keys_U = jnp.full(sorted_N.size, UNUSED, jnp.int32)
    return slot_N, keys_U.at[slot_N].set(sorted_N, indices_are_sorted=True)


def combine(ids_N: jax.Array, grads_ND: jax.Array) -> UniqueRows:
    """Sum the gradients of equal ids, in float32 and always in the same order.

    The ids are sorted (stably), so a distinct id owns one run of occurrences, and a run is summed
    from its first to its last. UNUSED among the ids is not counted as used.
    """
    sorted_N, order_N = jax.lax.sort_key_val(ids_N, jnp.arange(ids_N.size, dtype=jnp.int32))
    slot_N, ids_U = distinct(sorted_N)
    sums_UD = jax.ops.segment_sum(grads_ND[order_N].astype(jnp.float32), slot_N,
                                  num_segments=ids_N.size, indices_are_sorted=True)
    return UniqueRows(ids_U, sums_UD, jnp.sum(ids_U != UNUSED, dtype=jnp.int32), ids_U)
