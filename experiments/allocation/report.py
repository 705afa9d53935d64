"""Loss against the share of experts: parabolas and their lowest points, beside the paper's."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.results import arms, figures, fits
from engram_jax.results.arms import Result
from engram_jax.results.statistics import Interval, paired
from experiments import published

FIGURE = "loss_against_rho.png"
COLOURS = (figures.BLUE, figures.ORANGE)
ALONE = "rho-1"  # experts alone


def table(results: Sequence[Result]) -> str:
    """Every point against its budget's experts alone, and the parabolas."""
    lines = []
    for budget, runs in _budgets(results).items():
        lines += [arms.table(runs, f"{budget}-{ALONE}"), ""]
        if (curve := _parabola(runs)) is not None:
            lines += [f"{budget}: {curve}", ""]
        elif lost := arms.diverged(runs):
            lines += [f"{budget}: no parabola, for {', '.join(lost)} diverged", ""]
    return "\n".join(lines).rstrip()


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each budget, and below one for each of the paper's."""
    budgets = _budgets(results)
    drawn, axes = figures.panels(len(published.ALLOCATION), 3.6, rows=2)
    for each, (budget, runs), colour in zip(axes, budgets.items(), COLOURS, strict=False):
        cost = runs[0]["flops_per_token"] * runs[0]["tokens"]
        figures.title(each, f"{budget.replace('-', ' ')}: {cost:.1e} FLOPs")
        _ours(each, runs, f"{budget}-{ALONE}", colour)
    for each, (budget, points), colour in zip(
        axes[len(published.ALLOCATION):], published.ALLOCATION.items(), COLOURS, strict=True
    ):
        figures.title(each, f"the paper: {budget}")
        rhos, losses = zip(*points, strict=True)
        figures.points(each, rhos[:-1], [Interval(loss - losses[-1], None, None, 1)
                                         for loss in losses[:-1]], colour)
        _curve(each, fits.parabola(rhos, losses), losses[-1], colour)
    return drawn


def _budgets(results: Sequence[Result]) -> dict[str, list[Result]]:
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(arms.arm(result).partition("-rho-")[0], []).append(result)
    return grouped


def _parabola(results: Sequence[Result]) -> fits.Parabola | None:
    return fits.parabola([result["rho"] for result in results],
                         [result["loss"] for result in results],
                         [result["seed"] for result in results])


def _ours(axes: Axes, results: Sequence[Result], alone: str, colour: str) -> None:
    """Differences from experts alone at equal seeds, and the parabola."""
    losses = arms.losses(results)
    rhos = {arms.arm(result): result["rho"] for result in results}
    gaps = {name: paired(own, losses.get(alone, {})) for name, own in losses.items()
            if name != alone}
    told = {rhos[name]: gap for name, gap in gaps.items() if gap is not None}
    figures.points(axes, list(told), list(told.values()), colour)
    if alone in losses:
        _curve(axes, _parabola(results), float(np.mean(list(losses[alone].values()))), colour)


def _curve(axes: Axes, curve: fits.Parabola | None, alone: float, colour: str) -> None:
    """The parabola less the loss of experts alone, and where it is lowest."""
    ends = 0.4, 1.0
    if curve is not None:
        xs = np.linspace(*ends, 100)
        axes.plot(xs, curve(xs) - alone, color=colour, linewidth=1.3, linestyle="--")
    figures.level(axes, 0, "experts alone")
    if curve is not None and curve.vertex is not None and ends[0] <= curve.vertex <= ends[1]:
        axes.axvspan(max(curve.low, ends[0]), min(curve.high, ends[1]), color=colour, alpha=0.1,
                     linewidth=0)
        axes.axvline(curve.vertex, color=colour, linewidth=1)
        axes.annotate(f"{curve.vertex:.2f}", (curve.vertex, 0.02), xytext=(4, 0), weight="bold",
                      xycoords=("data", "axes fraction"), textcoords="offset points", color=colour)
    axes.margins(y=0.15)
    axes.set_xlabel("rho, experts' share of the sparse parameters")
    axes.set_ylabel("loss less experts' alone (nats)")
