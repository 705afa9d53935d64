"""Loss against the share of experts: parabolas and their lowest points, beside the paper's."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.analysis import arms, figures, fits
from engram_jax.analysis.arms import Result
from engram_jax.analysis.statistics import interval
from experiments import published

FIGURE = "loss_against_rho.png"
COLOURS = (figures.BLUE, figures.ORANGE)


def table(results: Sequence[Result]) -> str:
    """Every point against its budget's experts alone, and the parabolas."""
    lines = []
    for budget, found in _budgets(results).items():
        lines += [arms.table(found, f"{budget}-rho-1"), ""]
        curve = fits.parabola(*_columns(found))
        if curve is not None:
            lines += [f"{budget}: {curve}", ""]
    return "\n".join(lines).rstrip()


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each budget, and one for each of the paper's."""
    budgets = _budgets(results)
    drawn, axes = figures.panels(len(budgets) + len(published.ALLOCATION), 3.9)
    for each, (budget, found), colour in zip(axes, budgets.items(), COLOURS, strict=False):
        rhos, losses = _columns(found)
        cost = found[0]["flops_per_token"] * found[0]["tokens"]
        figures.title(each, f"{budget.replace('-', ' ')}: {cost:.1e} FLOPs")
        _panel(each, rhos, losses, colour)
    for each, (budget, points), colour in zip(
        axes[len(budgets):], published.ALLOCATION.items(), COLOURS, strict=True
    ):
        figures.title(each, f"the paper: {budget}")
        _panel(each, [rho for rho, _ in points], [loss for _, loss in points], colour)
    return drawn


def _budgets(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(arms.arm(result).partition("-rho-")[0], []).append(result)
    return found


def _columns(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    """The share that experts have of each run, and its loss."""
    return [result["rho"] for result in results], [result["loss"] for result in results]


def _panel(axes: Axes, rhos: Sequence[float], losses: Sequence[float], colour: str) -> None:
    places = sorted(set(rhos))
    figures.points(
        axes, places, [interval(y for x, y in zip(rhos, losses, strict=True) if x == place)
                       for place in places], colour)
    curve = fits.parabola(rhos, losses)
    if curve is not None:
        xs = np.linspace(min(places), max(places), 100)
        axes.plot(xs, curve(xs), color=colour, linewidth=1.3, linestyle="--")
        if curve.vertex is not None and min(places) <= curve.vertex <= max(places):
            low, high = max(curve.low, min(places)), min(curve.high, max(places))
            axes.axvspan(low, high, color=colour, alpha=0.1, linewidth=0)
            axes.axvline(curve.vertex, color=colour, linewidth=1)
            figures.label(axes, f"{curve.vertex:.2f}", (curve.vertex, axes.get_ylim()[1]), colour,
                          (4, -8))
    axes.set_xlabel("rho, experts' share of the sparse parameters")
    axes.set_ylabel("validation loss (nats a token)")
