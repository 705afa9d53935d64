"""Losses by optimizer and rate, paired by seed with dense Adam."""

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from engram_jax.config import RunConfig
from engram_jax.results import arms as grouping
from engram_jax.results import figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import paired
from engram_jax.tables.row_optimizers import row_optimizer, state_bytes
from experiments.row_optimizers.configs import MULTIPLIERS, SCALES, arms

FIGURE = "loss_by_optimizer.png"
ORACLE = "dense_adam"
COLOURS = (figures.SKY, figures.BLUE, figures.ORANGE)  # one a rate


def table(results: Sequence[Result]) -> str:
    """A line each arm: mean loss with the spread over seeds, and the paired difference."""
    grouped = _arms(results)
    lines = [f"{'optimizer':<24}{'rate':>7}{'loss':>9}{'sd':>8}{'against dense Adam (95 %)':>33}"
             f"{'state B/row':>13}{'seeds':>7}"]
    for (optimizer, multiplier), losses in grouped.items():
        whole = _finite(losses)
        mean = f"{statistics.mean(losses.values()):.4f}" if whole else "diverged"
        spread = f"{statistics.stdev(losses.values()):.4f}" if whole and len(losses) > 1 else "-"
        lines.append(
            f"{optimizer:<24}{f'x{multiplier:g}':>7}{mean:>9}"
            f"{spread:>8}{_gap(losses, grouped.get((ORACLE, multiplier), {})):>33}"
            f"{_bytes(optimizer):>13}{len(losses):>7}")
    return "\n".join([*lines, *(f"{name}: diverged" for name in grouping.diverged(results))])


def _finite(losses: Mapping[int, float]) -> bool:
    return all(map(math.isfinite, losses.values()))


def _arms(results: Sequence[Result]) -> dict[tuple[str, float], dict[int, float]]:
    """(optimizer, multiplier) -> seed -> loss; dense Adam first."""
    by_name = {run.name: run for run in _runs()}
    grouped = {(label(by_name[name]), by_name[name].optimizer.table_multiplier): losses
             for name, losses in grouping.losses(results).items()}
    return dict(sorted(grouped.items(), key=lambda item: (item[0][0] != ORACLE, item[0])))


def _runs() -> list[RunConfig]:
    return arms(SCALES["tiny"], MULTIPLIERS)


def label(run: RunConfig) -> str:
    """The optimizer's name, with the table's dtype where it is not float32."""
    assert run.model.engram is not None
    half = run.model.engram.table_dtype == "bfloat16"
    return run.optimizer.table_optimizer + (" bfloat16" if half else "")


def _gap(losses: Mapping[int, float], oracle: Mapping[int, float]) -> str:
    gap = paired(losses, oracle) if _finite(losses) and _finite(oracle) else None
    if gap is None or gap.low is None or losses == oracle:
        return "-"
    return gap.signed()


def _bytes(optimizer: str) -> int:
    run = next(run for run in _runs() if label(run) == optimizer)
    assert run.model.engram is not None
    return state_bytes(row_optimizer(run.optimizer), run.model.engram.head_dim)


def figure(results: Sequence[Result]) -> Figure:
    """Every run's loss by optimizer and rate."""
    grouped = _arms(results)
    names = list(dict.fromkeys(optimizer for optimizer, _ in grouped))
    drawn, (axes,) = figures.panels(1)
    for shift, (multiplier, colour) in enumerate(zip(MULTIPLIERS, COLOURS, strict=True)):
        for row, name in enumerate(names):
            losses = list(grouped.get((name, multiplier), {}).values())
            if not losses:
                continue
            height = [row + 0.22 * (shift - 1)] * len(losses)
            axes.plot(losses, height, "o", color=colour, markersize=5, alpha=0.75)
            axes.plot(statistics.mean(losses), height[0], "|", color=colour, markersize=15,
                      markeredgewidth=2, label=f"x{multiplier:g}" if row == 0 else None)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats a token); a dot a seed, a bar their mean")
    axes.legend(title="tables' rate over\nthe backbone's", frameon=False, loc="upper left",
                bbox_to_anchor=(1.0, 1.0))
    figures.plain(axes, "x")
    return drawn
