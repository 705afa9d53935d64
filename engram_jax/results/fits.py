"""Curves through losses: a line in log10(slots), and a parabola with its lowest point.

Runs of one seed share their start and their text, and another seed has another level, slope and
curvature. So every seed gets a curve of its own, and intervals are Student's t over the seeds:
they say where the curve of all seeds lies, and not how well one curve fits a few of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats

from engram_jax.results.statistics import CONFIDENCE


@dataclasses.dataclass(frozen=True)
class Line:
    """y = intercept + slope * log10(x), by least squares.

    Attributes:
      intercept: the mean of the seeds' own.
      slope: of y for each tenfold of x, the mean of the seeds' own.
      low, high: 95 % confidence interval of the slope (Student's t); None for one seed, which says
        nothing about the others.
      points, seeds: that the line goes through; no seeds where points share nothing.
    """

    intercept: float
    slope: float
    low: float | None
    high: float | None
    points: int
    seeds: int

    def __call__(self, x: npt.ArrayLike) -> np.ndarray:
        return self.intercept + self.slope * np.log10(x)

    def __str__(self) -> str:
        ends = ("of one seed" if self.low is None or self.high is None
                else f"{self.low:+.4f} to {self.high:+.4f}")
        return (f"{self.intercept:.4f} {self.slope:+.4f} log10(slots); slope {ends} "
                f"({_counted(self.points, self.seeds)})")


def _counted(points: int, seeds: int) -> str:
    return f"95 %, {points} runs" + (f" of {seeds} seeds" if seeds else "")


def line(x: Sequence[float], y: Sequence[float], seeds: Sequence[int] = ()) -> Line | None:
    """The line through the points.

    None with a y that is not finite (a run that diverged), and where a seed has fewer than three
    different x.

    Args:
      x, y: the points.
      seeds: the seed of each point; none are points that share nothing.
    """
    fit = _fit([np.log10(np.asarray(x, np.float64))], x, y, seeds)
    if fit is None:
        return None
    (level, slope), margin = fit.mean, fit.margin(1)
    low, high = (None, None) if margin is None else (float(slope - margin), float(slope + margin))
    return Line(float(level), float(slope), low, high, len(x), fit.seeds)


class _Fit(NamedTuple):
    """Coefficients: of the constant first, then of each column.

    Attributes:
      mean: over the seeds.
      covariance: of `mean`; None for one seed.
      free: degrees of freedom of the covariance.
      seeds: 0 where points share nothing.
    """

    mean: np.ndarray
    covariance: np.ndarray | None
    free: int
    seeds: int

    @property
    def t(self) -> float:
        return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, self.free))

    def margin(self, number: int) -> float | None:
        """Half the 95 % interval of a coefficient."""
        if self.covariance is None:
            return None
        return self.t * float(np.sqrt(self.covariance[number, number]))


def _fit(
    columns: Sequence[np.ndarray], x: Sequence[float], y: Sequence[float], seeds: Sequence[int]
) -> _Fit | None:
    """Least squares seed by seed; None where a curve would go through all of a seed's points."""
    ys = np.asarray(y, np.float64)
    design = np.stack([np.ones(len(ys)), *columns], axis=1)
    own = np.asarray(seeds if len(seeds) else [0] * len(ys))
    parts = [own == seed for seed in np.unique(own)]
    xs = np.asarray(x, np.float64)
    enough = all(len(np.unique(xs[part])) > design.shape[1] for part in parts)
    if not (parts and enough and np.isfinite(ys).all()):
        return None
    if not len(seeds):
        return _of_points(design, ys)
    each = np.stack([np.linalg.lstsq(design[part], ys[part], rcond=None)[0] for part in parts])
    count = len(parts)
    spread = None if count == 1 else np.cov(each.T) / count
    return _Fit(each.mean(axis=0), spread, count - 1, count)


def _of_points(design: np.ndarray, ys: np.ndarray) -> _Fit:
    """Least squares through points that share nothing; the residuals say how far to trust it."""
    solve = np.linalg.pinv(design)
    mean = solve @ ys
    residual, free = ys - design @ mean, len(ys) - design.shape[1]
    return _Fit(mean, residual @ residual / free * (solve @ solve.T), free, 0)


@dataclasses.dataclass(frozen=True)
class Parabola:
    """y = a + b x + c x**2, by least squares.

    Attributes:
      coefficients: a, b, c, the means of the seeds' own.
      vertex: -b / 2c, the x of the lowest y; None where the curve opens downwards (c <= 0).
      low, high: 95 % interval of the vertex: every x at which the curve's slope cannot be told from
        0 by Student's t (Fieller 1954). Infinite both where the curvature is not told to be
        above 0, for then the lowest point may lie anywhere.
      curvature_low, curvature_high: 95 % interval of c (Student's t): a U-shape is shown only where
        it lies above 0. Infinite for one seed.
      points, seeds: that the curve goes through; no seeds where points share nothing.
    """

    coefficients: tuple[float, float, float]
    vertex: float | None
    low: float
    high: float
    curvature_low: float
    curvature_high: float
    points: int
    seeds: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        a, b, c = self.coefficients
        return a + b * x + c * x**2

    def __str__(self) -> str:
        curvature = (f"curvature {self.coefficients[2]:+.4f} ({self.curvature_low:+.4f} to "
                     f"{self.curvature_high:+.4f}, {_counted(self.points, self.seeds)})")
        if self.vertex is None:
            return f"no lowest point; {curvature}"
        return f"lowest at {self.vertex:.2f} ({self.low:.2f} to {self.high:.2f}); {curvature}"


def parabola(
    x: Sequence[float], y: Sequence[float], seeds: Sequence[int] = ()
) -> Parabola | None:
    """The parabola through the points.

    None with a y that is not finite (a run that diverged), and where a seed has fewer than four
    different x.

    Args:
      x, y: the points; several with one x are runs of several seeds.
      seeds: the seed of each point; none are points that share nothing.
    """
    xs = np.asarray(x, np.float64)
    fit = _fit([xs, xs**2], x, y, seeds)
    if fit is None:
        return None
    a, b, c = map(float, fit.mean)
    margin = np.inf if (half := fit.margin(2)) is None else half
    low, high = _vertex_interval(fit, margin)
    return Parabola(
        coefficients=(a, b, c), vertex=-b / (2 * c) if c > 0 else None, low=low, high=high,
        curvature_low=c - margin, curvature_high=c + margin, points=len(xs), seeds=fit.seeds)


def _vertex_interval(fit: _Fit, margin: float) -> tuple[float, float]:
    """All v with |b + 2 c v| <= t * its standard error: between the roots of a parabola in v."""
    _, b, c = fit.mean
    if fit.covariance is None or c - margin <= 0:
        return -np.inf, np.inf
    unsure = fit.t**2 * fit.covariance
    square, half, constant = (4 * (c * c - unsure[2, 2]), 2 * (b * c - unsure[1, 2]),
                              b * b - unsure[1, 1])
    root = np.sqrt(max(half * half - square * constant, 0.0))
    return float((-half - root) / square), float((-half + root) / square)
