"""What all figures share: size, colours that everybody can tell, plain axes, how they are saved.

Colours are Okabe and Ito's.
"""

import io
from collections.abc import Sequence
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.results.statistics import Interval
from engram_jax.storage import write_bytes

BLUE, ORANGE, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
DARK, PALE = "#444444", "#DDDDDD"


def panels(count: int, height: float = 4.3, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` rows of `count` axes, each row `height` inches; the axes row by row."""
    figure, axes = plt.subplots(
        rows, count, figsize=(7.2 if count == 1 else 5.4 * count, height * rows), dpi=150,
        squeeze=False)
    for each in axes.flat:
        plain(each)
    return figure, list(axes.flat)


def plain(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """No frame, a pale grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11)


def points(
    axes: Axes, xs: Sequence[float], intervals: Sequence[Interval], colour: str, marker: str = "o"
) -> None:
    """Means with their 95 % intervals as bars."""
    means = np.array([each.mean for each in intervals])
    ends = np.array([[each.mean if end is None else end for end in (each.low, each.high)]
                     for each in intervals])
    axes.errorbar(xs, means, yerr=np.abs(ends.T - means), fmt=marker, color=colour, markersize=6,
                  capsize=3, linewidth=1.3, zorder=3)


def label(
    axes: Axes, text: str, at: tuple[float, float], colour: str, offset: tuple[int, int] = (10, 0)
) -> None:
    """A curve's name beside it."""
    axes.annotate(text, at, xytext=offset, va="center", textcoords="offset points", color=colour,
                  weight="bold")


def level(axes: Axes, height: float, text: str, colour: str = DARK) -> None:
    """A dashed line across, with its name at the right end, above it."""
    axes.axhline(height, color=colour, linewidth=1.3, linestyle="--")
    axes.annotate(text, (0.99, height), xytext=(0, 4), weight="bold", color=colour, ha="right",
                  xycoords=("axes fraction", "data"), textcoords="offset points")


def arms(axes: Axes, names: Sequence[str], intervals: Sequence[Interval],
         seeds: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    """A row for each arm: a dot for each seed, the mean and its interval."""
    for row, (each, values, colour) in enumerate(zip(intervals, seeds, colours, strict=True)):
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.45)
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [row, row], color=colour, linewidth=1.3)
        axes.plot(each.mean, row, "|", color=colour, markersize=14, markeredgewidth=2.2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=PALE, linewidth=0.7)


def png(figure: Figure) -> bytes:
    """The figure as PNG, closed."""
    image = io.BytesIO()
    figure.tight_layout()
    figure.savefig(image, format="png")
    plt.close(figure)
    return image.getvalue()


def save(figure: Figure, path: epath.PathLike) -> None:
    """Write a figure as PNG.

    Raises:
      MachineError: it cannot be written.
    """
    write_bytes(epath.Path(path), png(figure))
