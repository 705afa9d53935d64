"""Curves through losses: a line in log10(slots), and a parabola with its lowest point.

Runs of one seed share their start and their text, so a seed is a block: each block gets a level of
its own, slope and curvature are those within blocks, and every level costs a degree of freedom.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats

from engram_jax.results.statistics import CONFIDENCE

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Line:
    """y = intercept + slope * log10(x), by least squares.

    Attributes:
      intercept: the mean of the blocks' own.
      slope: of y for each tenfold of x.
      low, high: 95 % confidence interval of the slope (Student's t).
      points: that the line goes through.
    """

    intercept: float
    slope: float
    low: float
    high: float
    points: int

    def __call__(self, x: npt.ArrayLike) -> np.ndarray:
        return self.intercept + self.slope * np.log10(x)

    def __str__(self) -> str:
        return (f"{self.intercept:.4f} {self.slope:+.4f} log10(slots); slope {self.low:+.4f} to "
                f"{self.high:+.4f} (95 %, {self.points} runs)")


def line(x: Sequence[float], y: Sequence[float], blocks: Sequence[int] = ()) -> Line | None:
    """The line through the points; None with fewer than three different x, or too few points for
    a level a block and an interval.

    Args:
      x, y: the points.
      blocks: the seed of each point; none are points that share nothing.
    """
    if len(set(x)) < 3 or len(x) <= 1 + max(1, len(set(blocks))):
        return None
    fit = _least_squares([np.log10(np.asarray(x, np.float64))], y, blocks)
    (slope,), (margin,) = fit.found, fit.margins
    return Line(fit.level, float(slope), float(slope - margin), float(slope + margin), len(x))


class _Fit(NamedTuple):
    """Least squares with a level for each block.

    Attributes:
      level: the mean of the blocks' levels.
      found, margins: a coefficient for each column, and half its 95 % interval.
      fitted, residual, free: at each point, and degrees of freedom.
      solve: from values at the points to the coefficients of the columns.
    """

    level: float
    found: np.ndarray
    margins: np.ndarray
    fitted: np.ndarray
    residual: np.ndarray
    free: int
    solve: np.ndarray


def _least_squares(
    columns: Sequence[np.ndarray], y: Sequence[float], blocks: Sequence[int]
) -> _Fit:
    ys = np.asarray(y, np.float64)
    own = np.asarray(blocks if len(blocks) else [0] * len(ys))
    levels = (own[:, None] == np.unique(own)[None]).astype(np.float64)
    design = np.concatenate([levels, np.stack(columns, axis=1)], axis=1)
    solve = np.linalg.pinv(design)
    found, free, count = solve @ ys, len(ys) - design.shape[1], levels.shape[1]
    residual = ys - design @ found
    error = np.sqrt(residual @ residual / free * np.diag(solve @ solve.T)[count:])
    margins = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, free) * error
    return _Fit(float(found[:count].mean()), found[count:], margins, design @ found, residual, free,
                solve[count:])


@dataclasses.dataclass(frozen=True)
class Parabola:
    """y = a + b x + c x**2, by least squares.

    Attributes:
      coefficients: a, b, c; a is the mean of the blocks' own.
      vertex: -b / 2c, the x of the lowest y; None where the curve opens downwards (c <= 0).
      low, high: 95 % interval of the vertex, over resampled residuals; infinite where more than
        2.5 % of the resampled curves have no lowest point on that side.
      curvature_low, curvature_high: 95 % interval of c (Student's t): a U-shape is shown only where
        it lies above 0.
      points: that the curve goes through.
    """

    coefficients: tuple[float, float, float]
    vertex: float | None
    low: float
    high: float
    curvature_low: float
    curvature_high: float
    points: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        a, b, c = self.coefficients
        return a + b * x + c * x**2

    def __str__(self) -> str:
        curvature = (f"curvature {self.coefficients[2]:+.4f} ({self.curvature_low:+.4f} to "
                     f"{self.curvature_high:+.4f}, 95 %, {self.points} runs)")
        if self.vertex is None:
            return f"no lowest point; {curvature}"
        return f"lowest at {self.vertex:.2f} ({self.low:.2f} to {self.high:.2f}); {curvature}"


def parabola(
    x: Sequence[float], y: Sequence[float], blocks: Sequence[int] = (), seed: int = 0
) -> Parabola | None:
    """The parabola through the points; None with fewer than four different x, or too few points
    for a level a block and an interval.

    Args:
      x, y: the points; several with one x are runs of several seeds.
      blocks: the seed of each point; none are points that share nothing.
      seed: of the resampling.
    """
    if len(set(x)) < 4 or len(x) <= 2 + max(1, len(set(blocks))):
        return None
    xs = np.asarray(x, np.float64)
    fit = _least_squares([xs, xs**2], y, blocks)
    (b, c), (_, margin) = fit.found, fit.margins
    low, high = _vertex_interval(
        fit.fitted, fit.residual * np.sqrt(len(xs) / fit.free), fit.solve, seed)
    return Parabola(
        coefficients=(fit.level, float(b), float(c)),
        vertex=float(-b / (2 * c)) if c > 0 else None, low=low, high=high,
        curvature_low=float(c - margin), curvature_high=float(c + margin), points=len(xs))


def _vertex_interval(
    fitted: np.ndarray, residual: np.ndarray, solve: np.ndarray, seed: int
) -> tuple[float, float]:
    """Percentiles of the vertex over curves with resampled residuals.

    A curve that opens downwards is lowest at one of its ends: infinitely far on the side that it
    falls to.
    """
    chosen = np.random.default_rng(seed).choice(residual, (RESAMPLES, len(residual)))
    b, c = solve @ (fitted + chosen).T
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(c > 0, -b / (2 * c), np.where(b + c > 0, -np.inf, np.inf))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(vertex, [tail, 100 - tail], method="nearest")
    return float(low), float(high)
