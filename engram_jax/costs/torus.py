"""How long collectives take on a slice's links, by the busiest one of them.

Everything goes by shortest paths, one axis after another, and all groups of a collective talk at
once. What libtpu really does, and what it takes to begin, is not in it; nothing here has been
compared with a running TPU.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence

from engram_jax.costs.collectives import Collective, Groups

Link = tuple[tuple[int, ...], int, int]  # a line of chips, a chip in it, +1 or -1
Hop = tuple[tuple[int, ...], int, int, float]  # a line, from where to where in it, and how much
Line = tuple[tuple[int, ...], collections.Counter[int]]  # a line of chips, and devices by place


@dataclasses.dataclass(frozen=True)
class Torus:
    """The links of a slice.

    Attributes:
      sizes: chips along each axis.
      rings: whether each axis closes to a ring, or is a line.
      link: bytes a second over one link in one direction; a chip has two links an axis.
      places: the chip of each device, in the order of the program's devices.
    """

    sizes: tuple[int, ...]
    rings: tuple[bool, ...]
    link: float
    places: tuple[tuple[int, ...], ...]

    def seconds(self, one: Collective) -> float:
        """The time of one collective each time that it runs, by its bytes over the links alone.

        What is gathered, and what is scattered as it is summed, is passed on from member to member
        of a group, both ways, along all axes that the group spans at once.
        """
        if one.kind == "collective-permute":
            return one.bytes * self._permuted(one.groups) / self.link
        groups = one.groups or (tuple(range(len(self.places))),)
        members = len(groups[0])
        if members <= 1:
            return 0.0
        if one.kind in ("all-to-all", "ragged-all-to-all"):
            return one.bytes * self._exchanged(groups) / self.link
        if not (width := self._width(groups)):  # of devices on one chip
            return 0.0
        parts = {"all-gather": members - 1, "all-reduce": 2 * (members - 1) / members,
                 "reduce-scatter": (members - 1) / members}
        return one.bytes * parts.get(one.kind, 1) / (width * self.link)

    @functools.cache  # noqa: B019 - few slices, few groups, and a pod's take a while
    def _width(self, groups: Groups) -> float:
        """Over how many links at once a member gets what the others of its group have."""
        width = 0.0
        for axis in range(len(self.sizes)):
            hops: list[Hop] = []
            for line, places in self._lines(groups, axis):
                ordered = sorted(places)
                following = zip(ordered, (*ordered[1:], ordered[0]), strict=True)
                hops += [(line, *pair, 1.0) for one, other in following
                         for pair in ((one, other), (other, one))]
            if busiest := self._busiest(hops, axis):
                width += 2 / busiest
        if not width:  # no two of a group on a line: from each to the next, and back
            around = (pair for group in groups for pair in zip(
                group, (*group[1:], group[0]), strict=True))
            if busiest := self._permuted(tuple(way for one, other in around
                                               for way in ((one, other), (other, one)))):
                width = 2 / busiest
        return width

    @functools.cache  # noqa: B019
    def _exchanged(self, groups: Groups) -> float:
        """Of what a member puts in, how often it passes over the busiest link, if every member
        gets an equal part."""
        most = max(self._busiest(
            [(line, one, other, places[one] * places[other] / places.total())
             for line, places in self._lines(groups, axis)
             for one in places for other in places if one != other], axis)
            for axis in range(len(self.sizes)))
        # 0 where no two of a group are on a line.
        return most or self._permuted(tuple(
            (one, other) for group in groups for one in group for other in group
            if one != other)) / len(groups[0])

    @functools.cache  # noqa: B019
    def _permuted(self, pairs: Groups) -> float:
        """How many of the pairs' messages pass over the busiest link; 1 where nobody says whom."""
        hops: list[list[Hop]] = [[] for _ in self.sizes]
        for one, other in pairs:
            here, there = list(self.places[one]), self.places[other]
            for axis, goal in enumerate(there):
                line = tuple(-1 if each == axis else place for each, place in enumerate(here))
                if here[axis] != goal:
                    hops[axis].append((line, here[axis], goal, 1.0))
                here[axis] = goal
        return max(map(self._busiest, hops, range(len(hops))), default=0.0) if pairs else 1.0

    def _lines(self, groups: Groups, axis: int) -> Iterable[Line]:
        """The places of a group's members along an axis, and how many are at each, for each line
        of chips that has two places."""
        for group in groups:
            lines: dict[tuple[int, ...], collections.Counter[int]] = (
                collections.defaultdict(collections.Counter))
            for device in group:
                place = self.places[device]
                lines[*place[:axis], -1, *place[axis + 1:]][place[axis]] += 1
            yield from ((line, own) for line, own in lines.items() if len(own) > 1)

    def _busiest(self, hops: Sequence[Hop], axis: int) -> float:
        """The most that passes over one link of an axis, in one direction."""
        loads: collections.defaultdict[Link, float] = collections.defaultdict(float)
        size = self.sizes[axis]
        for line, start, stop, amount in hops:
            if not self.rings[axis]:
                ways = [(1 if stop > start else -1, abs(stop - start), amount)]
            else:
                up = (stop - start) % size
                ways = [(1, up, amount), (-1, size - up, amount)]
                ways = ([min(ways, key=lambda way: way[1])] if 2 * up != size else
                        [(sign, count, amount / 2) for sign, count, _ in ways])
            for sign, count, part in ways:
                for step in range(count):
                    loads[line, (start + sign * step) % size, sign] += part
        return max(loads.values(), default=0.0)
