"""Curves through losses: a line in log10(slots), and a parabola with its lowest point."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.stats

from engram_jax.analysis.statistics import CONFIDENCE

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Line:
    """y = intercept + slope * log10(x), by least squares.

    Attributes:
      slope: of y for each tenfold of x.
      low, high: 95 % confidence interval of the slope (Student's t over the points).
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


def line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The line through the points; None with fewer than three different x."""
    if len(set(x)) < 3:
        return None
    found = scipy.stats.linregress(np.log10(np.asarray(x, np.float64)), np.asarray(y, np.float64))
    margin = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2) * found.stderr
    return Line(float(found.intercept), float(found.slope), float(found.slope - margin),
                float(found.slope + margin), len(x))


@dataclasses.dataclass(frozen=True)
class Parabola:
    """y = a + b x + c x**2, by least squares.

    Attributes:
      coefficients: a, b, c.
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


def parabola(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Parabola | None:
    """The parabola through the points; None with fewer than four different x.

    Args:
      x, y: the points; several with one x are runs of several seeds.
      seed: of the resampling.
    """
    if len(set(x)) < 4:
        return None
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    design = np.stack([np.ones_like(xs), xs, xs**2], axis=1)
    solve = np.linalg.pinv(design)
    found = solve @ ys
    residual = ys - design @ found
    free = len(xs) - 3
    error = np.sqrt(residual @ residual / free * (solve @ solve.T)[2, 2])
    margin = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, free) * error
    low, high = _vertex_interval(design @ found, residual * np.sqrt(len(xs) / free), solve, seed)
    return Parabola(
        coefficients=(float(found[0]), float(found[1]), float(found[2])),
        vertex=float(-found[1] / (2 * found[2])) if found[2] > 0 else None, low=low, high=high,
        curvature_low=float(found[2] - margin), curvature_high=float(found[2] + margin),
        points=len(xs))


def _vertex_interval(
    fitted: np.ndarray, residual: np.ndarray, solve: np.ndarray, seed: int
) -> tuple[float, float]:
    """Percentiles of the vertex over curves with resampled residuals.

    A curve that opens downwards is lowest at one of its ends: infinitely far on the side that it
    falls to.
    """
    chosen = np.random.default_rng(seed).choice(residual, (RESAMPLES, len(residual)))
    _, b, c = solve @ (fitted + chosen).T
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(c > 0, -b / (2 * c), np.where(b + c > 0, -np.inf, np.inf))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(vertex, [tail, 100 - tail], method="nearest")
    return float(low), float(high)
