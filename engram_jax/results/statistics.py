"""A mean over seeds with its confidence interval, and the difference of two arms at equal seeds."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import scipy.stats

CONFIDENCE = 0.95

Seed = TypeVar("Seed")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with the 95 % confidence interval of Student's t.

    Attributes:
      mean: of the values, in their unit.
      low, high: ends of the interval, in the same unit; None for one value, which says nothing
        about the spread.
      count: how many values there were, at least 1.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}{self._ends('.4f')}"

    def signed(self) -> str:
        """As text with signs, for differences."""
        return f"{self.mean:+.4f}{self._ends('+.4f')}"

    def _ends(self, form: str) -> str:
        if self.low is None or self.high is None:
            return ""
        return f" ({self.low:{form}} to {self.high:{form}})"


def interval(values: Iterable[float]) -> Interval:
    """mean +- t(0.975, n - 1) s / sqrt(n), s being the sample's standard deviation.

    Raises:
      ValueError: there are no values.
    """
    found = np.array(list(values), np.float64)
    count = len(found)
    if count == 0:
        raise ValueError("0 values have no mean")
    mean = float(found.mean())
    if count == 1:
        return Interval(mean, None, None, 1)
    error = float(found.std(ddof=1)) / count**0.5
    margin = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Interval(mean, mean - margin, mean + margin, count)


def paired(values: Mapping[Seed, float], baseline: Mapping[Seed, float]) -> Interval | None:
    """The interval of `values` less `baseline` over the seeds that both have; None without any.

    Arms that share seeds share their start and the order of the text, so the differences spread
    less than the values do.
    """
    shared = [seed for seed in values if seed in baseline]
    if not shared:
        return None
    return interval(values[seed] - baseline[seed] for seed in shared)
