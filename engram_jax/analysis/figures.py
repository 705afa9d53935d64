"""Figures of experiments: labelled axes, direct labels, colours that everybody can tell.

Colours are Okabe and Ito's.
"""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from matplotlib.axes import Axes

from engram_jax.accounting import short
from engram_jax.analysis.scaling import Result, fit
from engram_jax.storage import refusals

COLOURS = {"Engram": "#0072B2", "OverEncoding": "#D55E00", "no memory": "#444444"}
MARKERS = {"Engram": "o", "OverEncoding": "s"}


def memory_scaling(results: Sequence[Result], path: epath.PathLike) -> None:
    """Validation loss against the number of slots, written to `path` (PNG or SVG)."""
    figure, axes = plt.subplots(figsize=(7.2, 4.3), dpi=150)
    axes.set_xscale("log")
    for name in ("Engram", "OverEncoding"):
        points = [(r["slots"], r["loss"]) for r in results if r["memory"] == name]
        if points:
            slots, losses = np.array(points, np.float64).T
            axes.plot(slots, losses, MARKERS[name], color=COLOURS[name], markersize=7, zorder=3)
            axes.annotate(name, (slots[-1], losses[-1]), xytext=(10, 0), va="center",
                          textcoords="offset points", color=COLOURS[name], weight="bold")
    _line(axes, results)
    _baseline(axes, results)
    sizes = sorted({r["slots"] for r in results if r["slots"]})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 3.2)
    axes.set_xlabel("slots (rows of one head's table)")
    axes.set_ylabel("validation loss (nats a token)")
    active = max(r["active_params"] for r in results)
    axes.set_title(f"Memory size at {short(active)} active parameters and "
                   f"{short(results[0]['tokens'])} tokens", loc="left", fontsize=11)
    axes.margins(y=0.1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.tight_layout()
    place, image = epath.Path(path), io.BytesIO()
    figure.savefig(image, format=place.suffix.removeprefix("."))
    plt.close(figure)
    with refusals(place, "written"):
        place.write_bytes(image.getvalue())


def _line(axes: Axes, results: Sequence[Result]) -> None:
    line = fit(results)
    if line is None:
        return
    sizes = [r["slots"] for r in results if r["memory"] == "Engram"]
    xs = np.geomspace(min(sizes), max(sizes), 50)
    axes.plot(xs, line(xs), color=COLOURS["Engram"], linewidth=1.3, alpha=0.7)
    margin = (line.high - line.low) / 2
    slope = f"{line.slope:+.3f} ± {margin:.3f}".replace("-", "\N{MINUS SIGN}")
    axes.annotate(f"{slope} nats a tenfold (95 %)", (xs[18], line(xs[18:19])[0]),
                  xytext=(8, 8), textcoords="offset points", color=COLOURS["Engram"])


def _baseline(axes: Axes, results: Sequence[Result]) -> None:
    for result in results:
        if result["memory"] == "no memory":
            axes.axhline(result["loss"], color=COLOURS["no memory"], linewidth=1.3, linestyle="--")
            axes.annotate("no memory", (0.01, result["loss"]), xytext=(0, 4), weight="bold",
                          xycoords=("axes fraction", "data"), textcoords="offset points",
                          color=COLOURS["no memory"])
