"""What each tier of a stack did: a cache on the device, one in host memory, and the table below.

Shapes: N kinds of latency.
"""

import dataclasses
import math
import operator
import threading
from collections.abc import Callable

import numpy as np

_PER_OCTAVE = 8  # kinds of latency between one and its double: percentiles are right to a ninth
_SHORTEST = -24  # 2 ** it seconds, 60 ns; what takes less is counted with it
_KINDS = _PER_OCTAVE * 32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TierCounts:
    """Counts what one tier did.

    Counts of the same tier of several tables add up, and earlier ones can be taken away.

    Attributes:
      lookups: requests that were answered.
      asked, hits: rows, and those of them that this tier had; a whole table has them all.
      bytes: of the hits.
      seconds: until answers were there, the tiers below included.
      latency_N: how many lookups took how long, int64.
    """

    lookups: int = 0
    asked: int = 0
    hits: int = 0
    bytes: int = 0
    seconds: float = 0.0
    latency_N: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(_KINDS, np.int64))

    def __add__(self, other: "TierCounts") -> "TierCounts":
        return self._with(operator.add, other)

    def __sub__(self, before: "TierCounts") -> "TierCounts":
        return self._with(operator.sub, before)

    def _with(self, both: Callable, other: "TierCounts") -> "TierCounts":
        return TierCounts(**{name: both(value, getattr(other, name))
                             for name, value in vars(self).items()})

    @property
    def hit_rate(self) -> float:
        """The share of the rows asked for that it had."""
        return self.hits / self.asked if self.asked else 0.0

    def latency_us(self, percent: float) -> float:
        """What so many per cent of the lookups took at most; 0 if there were none."""
        if not self.lookups:
            return 0.0
        kind = int(np.searchsorted(np.cumsum(self.latency_N), percent / 100 * self.lookups))
        octave, part = divmod(kind, _PER_OCTAVE)
        return 1e6 * 2.0 ** (_SHORTEST + octave) * (1 + (part + 1) / _PER_OCTAVE)


class TierMeter:
    """Counts what a tier does; several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lookups = self._asked = self._hits = self._bytes = 0
        self._seconds, self._latency_N = 0.0, [0] * _KINDS

    def count(self, asked: int, hits: int, row_bytes: int, seconds: float) -> None:
        """One lookup that was answered: rows, those that were here, bytes of each, and its time."""
        fraction, exponent = math.frexp(seconds)  # seconds = fraction * 2 ** exponent, from 1/2 on
        kind = _PER_OCTAVE * (exponent - 1 - _SHORTEST) + int(_PER_OCTAVE * (2 * fraction - 1))
        with self._lock:
            self._lookups += 1
            self._asked += asked
            self._hits += hits
            self._bytes += hits * row_bytes
            self._seconds += seconds
            self._latency_N[min(max(kind, 0), _KINDS - 1)] += 1

    def counts(self) -> TierCounts:
        """What has been counted so far."""
        with self._lock:
            return TierCounts(
                lookups=self._lookups, asked=self._asked, hits=self._hits, bytes=self._bytes,
                seconds=self._seconds, latency_N=np.array(self._latency_N, np.int64))


def summed(stacks: list[dict[str, TierCounts]]) -> dict[str, TierCounts]:
    """The counts of several stacks, tier by tier, in the order of the first one's tiers."""
    total: dict[str, TierCounts] = {}
    for stack in stacks:
        for name, counts in stack.items():
            total[name] = total[name] + counts if name in total else counts
    return total
