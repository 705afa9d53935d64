"""Loss against memory size: the table, and the line through it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from engram_jax.accounting import short

Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Fit:
    """loss = intercept + slope * log10(slots), by least squares.

    Attributes:
      slope: nats for each tenfold.
      low, high: 95 % confidence interval of the slope.
      points: runs that the line goes through.
    """

    intercept: float
    slope: float
    low: float
    high: float
    points: int

    def __call__(self, slots: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * np.log10(slots)

    def __str__(self) -> str:
        return (f"loss = {self.intercept:.4f} {self.slope:+.4f} log10(slots); slope "
                f"{self.low:+.4f} to {self.high:+.4f} (95 %, {self.points} runs)")


def fit(results: Sequence[Result]) -> Fit | None:
    """The line through the Engram runs; None with fewer than three sizes."""
    points = [(r["slots"], r["loss"]) for r in results if r["memory"] == "Engram"]
    if len({slots for slots, _ in points}) < 3:
        return None
    slots, losses = np.array(points, np.float64).T
    line = scipy.stats.linregress(np.log10(slots), losses)
    margin = scipy.stats.t.ppf(0.975, len(points) - 2) * line.stderr
    return Fit(float(line.intercept), float(line.slope), float(line.slope - margin),
               float(line.slope + margin), len(points))


COLUMNS = (
    ("run", 24, lambda r: r["name"]),
    ("slots", 10, lambda r: f"{r['slots']:,}"),
    ("memory", 10, lambda r: short(r["memory_params"])),
    ("total", 10, lambda r: short(r["total_params"])),
    ("active", 10, lambda r: short(r["active_params"])),
    ("loss", 9, lambda r: f"{r['loss']:.4f}"),
    ("bits/byte", 11, lambda r: f"{r['bits_per_byte']:.4f}"),
    ("tokens/s", 10, lambda r: f"{r['tokens_per_s']:,.0f}"),
)


def table(results: Sequence[Result]) -> str:
    """The runs side by side, a line each."""
    head = "".join(f"{name:<{width}}" if name == "run" else f"{name:>{width}}"
                   for name, width, _ in COLUMNS)
    lines = [head, "-" * len(head)]
    lines += ["".join(f"{value(r):<{width}}" if name == "run" else f"{value(r):>{width}}"
                      for name, width, value in COLUMNS) for r in results]
    return "\n".join(lines)
