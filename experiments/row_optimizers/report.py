"""Losses by optimizer and rate, paired by seed with dense Adam."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.config import RunConfig
from engram_jax.costs.accounting import short
from engram_jax.results import arms as grouping
from engram_jax.results import figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import paired
from engram_jax.tables.row_optimizers import row_optimizer, state_bytes
from experiments.row_optimizers.configs import LARGEST, MULTIPLIERS, PAPER, arms, long_arms

FIGURE = "loss_by_optimizer.png"
ORACLE = "dense_adam"
COLOURS = (figures.SKY, figures.BLUE, figures.ORANGE)  # one a rate

Losses = Mapping[int, float]  # seed -> validation loss


class Arm(NamedTuple):
    """What a result's table was trained by: optimizer, rate over the backbone's, budget."""

    optimizer: str
    rate: float
    tokens: int


def table(results: Sequence[Result]) -> str:
    """For each budget a line each arm: mean loss with the spread over seeds, and the paired
    difference; then, for each optimizer, that of its rates."""
    grouped = _arms(results)
    lines = []
    for tokens in sorted({arm.tokens for arm in grouped}):
        own = {arm: losses for arm, losses in grouped.items() if arm.tokens == tokens}
        lines += [f"{short(tokens) + ' tokens':<24}{'rate':>7}{'loss':>9}{'sd':>8}"
                  f"{'against dense Adam (95 %)':>33}{'state B/row':>13}{'seeds':>7}",
                  *(_line(arm, grouped) for arm in own), "",
                  *(f"{arm.optimizer}, x{LARGEST:g} less x{PAPER:g}: {gap}" for arm in own
                    if arm.rate == LARGEST
                    and (gap := _gap(own[arm], own.get(arm._replace(rate=PAPER), {}))) != "-"),
                  ""]
    return "\n".join([*lines, *(f"{name}: diverged" for name in grouping.diverged(results))])


def _line(arm: Arm, grouped: Mapping[Arm, Losses]) -> str:
    losses = grouped[arm]
    whole = _finite(losses)
    mean = f"{statistics.mean(losses.values()):.4f}" if whole else "diverged"
    spread = f"{statistics.stdev(losses.values()):.4f}" if whole and len(losses) > 1 else "-"
    oracle = grouped.get(arm._replace(optimizer=ORACLE), {})
    return (f"{arm.optimizer:<24}{f'x{arm.rate:g}':>7}{mean:>9}{spread:>8}"
            f"{_gap(losses, oracle):>33}{_bytes(arm.optimizer):>13}{len(losses):>7}")


def _finite(losses: Losses) -> bool:
    return all(map(math.isfinite, losses.values()))


def _arms(results: Sequence[Result]) -> dict[Arm, Losses]:
    """The losses of each arm; dense Adam first."""
    by_name = {run.name: run for run in _runs()}
    tokens = {grouping.arm(each): each["tokens"] for each in results}
    grouped = {Arm(label(run := by_name[name]), run.optimizer.table_multiplier, tokens[name]): own
               for name, own in grouping.losses(results).items()}
    return dict(sorted(grouped.items(), key=lambda item: (item[0].optimizer != ORACLE, item[0])))


def _runs() -> list[RunConfig]:
    return [*arms(MULTIPLIERS), *long_arms((PAPER, LARGEST))]


def label(run: RunConfig) -> str:
    """The optimizer's name, with the table's dtype where it is not float32."""
    assert run.model.engram is not None
    half = run.model.engram.table_dtype == "bfloat16"
    return run.optimizer.table_optimizer + (" bfloat16" if half else "")


def _gap(losses: Losses, oracle: Losses) -> str:
    gap = paired(losses, oracle) if _finite(losses) and _finite(oracle) else None
    if gap is None or gap.low is None or losses == oracle:
        return "-"
    return gap.signed()


def _bytes(optimizer: str) -> int:
    run = next(run for run in _runs() if label(run) == optimizer)
    assert run.model.engram is not None
    return state_bytes(row_optimizer(run.optimizer), run.model.engram.head_dim)


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each budget: every run's loss by optimizer and rate, a bar for their mean."""
    grouped = _arms(results)
    budgets = sorted({arm.tokens for arm in grouped})
    drawn, axes = figures.panels(max(1, len(budgets)))
    for each, tokens in zip(axes, budgets, strict=False):
        _panel(each, {arm: own for arm, own in grouped.items() if arm.tokens == tokens})
        figures.title(each, f"{short(tokens)} tokens")
    axes[-1].legend(
        *axes[0].get_legend_handles_labels(), title="tables' rate over\nthe backbone's",
        frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawn


def _panel(axes: Axes, grouped: Mapping[Arm, Losses]) -> None:
    names = list(dict.fromkeys(arm.optimizer for arm in grouped))
    for arm, own in grouped.items():
        at = MULTIPLIERS.index(arm.rate)
        height, losses = names.index(arm.optimizer) + 0.22 * (at - 1), list(own.values())
        axes.plot(losses, [height] * len(losses), "o", color=COLOURS[at], markersize=5, alpha=0.75)
        axes.plot(statistics.mean(losses), height, "|", color=COLOURS[at], markersize=15,
                  markeredgewidth=2, label=f"x{arm.rate:g}" if arm.optimizer == names[0] else None)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("validation loss (nats a token)")
    figures.plain(axes, "x")
