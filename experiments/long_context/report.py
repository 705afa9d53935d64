"""Needles found before and after the extension, by arm, beside the paper's table."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from engram_jax.results import figures
from engram_jax.results.statistics import interval, paired
from experiments import published
from experiments.long_context.language import KINDS, LONG

FIGURE = "needles.png"
BASELINE = "experts"
ARMS = {"experts": "experts alone", "engram-equal-loss": "Engram at equal loss",
        "engram": "Engram at equal steps"}
COLOURS = dict(zip(ARMS, (figures.DARK, figures.ORANGE, figures.BLUE), strict=True))
STAGES = {"before": "as trained", "stretched": "YaRN, untrained", "after": "extended"}

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """The arms, then needles found by stage, arm and length, each less experts at equal seeds."""
    return "\n\n".join([_arms(rows), *(_of_kind(rows, kind) for kind in KINDS), _paper()])


def _arms(rows: Sequence[Row]) -> str:
    lines = [f"{'':<24}{'step':>18}{'loss before (95 %)':>28}{'loss at 512 (95 %)':>28}"
             f"{'total':>10}{'memory':>9}{'FLOPs/token':>13}"]
    for arm in ARMS:
        own = {row["seed"]: row for row in rows if row["arm"] == arm}
        first = next(iter(own.values()))
        steps = ", ".join(str(row["step"]) for row in own.values())
        lines.append(
            f"{arm:<24}{steps:>18}"
            f"{interval(row['loss'] for row in own.values())!s:>28}"
            f"{interval(row['long_loss'] for row in own.values())!s:>28}"
            f"{first['total_params']:>10,}{first['memory_params']:>9,}"
            f"{first['flops_per_token']:>13,}")
    return "\n".join(lines)


def _of_kind(rows: Sequence[Row], kind: str) -> str:
    """The share found at the longest length for every stage, and what it is less experts'."""
    lines = [f"{kind} at {LONG.length} tokens, share found (95 %)"]
    for arm in ARMS:
        for stage, said in STAGES.items():
            own = right_of(rows, arm, stage, kind, LONG.length)
            gap = None if arm == BASELINE else paired(
                own, right_of(rows, BASELINE, stage, kind, LONG.length))
            less = "" if gap is None else gap.signed()
            lines.append(f"  {arm:<24}{said:<18}{interval(own.values())!s:>28}{less:>30}")
    return "\n".join(lines)


def right_of(rows: Sequence[Row], arm: str, stage: str, kind: str, length: int) -> dict[int, float]:
    """By seed the share of right answers."""
    return {row["seed"]: row["right"] for row in rows
            if (row["arm"], row["stage"], row["kind"], row["length"]) == (arm, stage, kind, length)}


def _paper() -> str:
    """The paper's columns of the same names."""
    lines = [f"the paper, 32,768 tokens{'':<20}" + "".join(f"{kind:>13}" for kind in KINDS)]
    for model, checkpoints in published.LONG_CONTEXT.items():
        for (steps, loss), values in checkpoints.items():
            columns = dict(zip(published.RULER, values, strict=True))
            lines.append(f"  {model} ({steps:,} steps, loss {loss}){'':<4}".ljust(44)
                         + "".join(f"{columns[kind]:>13.1f}" for kind in KINDS))
    return "\n".join(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """A panel a kind: the share found against the length, before and after; a dot a seed."""
    drawn, axes = figures.panels(len(KINDS), 3.7)
    lengths = sorted({row["length"] for row in rows})
    for each, kind in zip(axes, KINDS, strict=True):
        for arm, name in ARMS.items():
            for stage, style in (("before", "--"), ("after", "-")):
                seeds = [right_of(rows, arm, stage, kind, length) for length in lengths]
                for length, values in zip(lengths, seeds, strict=True):
                    each.plot([length] * len(values), list(values.values()), "o", markersize=3,
                              color=COLOURS[arm], alpha=0.5)
                each.plot(lengths, [interval(values.values()).mean for values in seeds], style,
                          color=COLOURS[arm], linewidth=1.6,
                          label=name if stage == "after" else None)
        figures.title(each, f"{kind} (dashed: before the extension)")
        each.set_xscale("log", base=2)
        each.set_xticks(lengths, [str(length) for length in lengths])
        each.set_ylim(-0.04, 1.04)
        each.set_xlabel("tokens")
        each.set_ylabel("share of answers that are right")
    axes[0].legend(frameon=False, labelcolor="linecolor", handlelength=1.2, loc="center right",
                   bbox_to_anchor=(1.0, 0.72))
    return drawn

