"""A mean over seeds with its confidence interval, and the difference of two arms at equal seeds."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
RESAMPLES = 20_000  # up to so many samples are all taken, or else so many drawn

Seed = TypeVar("Seed")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with a 95 % confidence interval.

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
        """Write it with signs, for differences."""
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
    sample = np.array(list(values), np.float64)
    count = len(sample)
    if count == 0:
        raise ValueError("0 values have no mean")
    mean = float(sample.mean())
    if count == 1:
        return Interval(mean, None, None, 1)
    error = float(sample.std(ddof=1)) / count**0.5
    margin = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Interval(mean, mean - margin, mean + margin, count)


def paired(values: Mapping[Seed, float], baseline: Mapping[Seed, float]) -> Interval | None:
    """The interval of `values` less `baseline` over the seeds that both have; None without any.

    Arms that share seeds share their start and the order of the text, so the differences spread
    less than the values do.
    """
    gaps = differences(values, baseline)
    return interval(gaps) if gaps else None


def differences(values: Mapping[Seed, float], baseline: Mapping[Seed, float]) -> list[float]:
    """`values` less `baseline` at the seeds that both have."""
    return [values[seed] - baseline[seed] for seed in values if seed in baseline]


def bootstrap(values: Iterable[float]) -> Interval:
    """The mean, and the middle 95 % of the means of samples drawn from the values themselves.

    It believes in no normal distribution, as Student's t does, but knows no value that was not
    met: of three seeds it can say no more than from the least to the largest, and holds the truth
    less often than 95 times in 100. Where there are few, all samples are taken.

    Raises:
      ValueError: there are no values.
    """
    sample = np.array(list(values), np.float64)
    count = len(sample)
    if count < 2:
        return interval(sample)
    if count**count <= RESAMPLES:
        drawn = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(sample[drawn].mean(axis=1), [tail, 100 - tail],
                              method="inverted_cdf")
    return Interval(float(sample.mean()), float(low), float(high), count)
