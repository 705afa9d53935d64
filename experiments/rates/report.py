"""Losses by rate and budget, and what memory gains where each arm has its own best rate."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from engram_jax.costs.accounting import short
from engram_jax.results import arms, figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import interval, paired
from experiments.rates.configs import ARMS

FIGURE = "loss_by_rate.png"
COLOURS = dict(zip(ARMS, (figures.DARK, figures.BLUE), strict=True))
NAMES = dict(zip(ARMS, ("experts alone", "rho 0.4"), strict=True))
_NAME = re.compile(r"(?P<arm>.+)-rate-(?P<rate>.+)-\d+x")

Losses = Mapping[int, float]  # seed -> validation loss


class Setting(NamedTuple):
    """What a result was trained with."""

    tokens: int
    arm: str
    rate: float


def losses(results: Sequence[Result]) -> Mapping[Setting, Losses]:
    """The losses of each setting; one with a run that diverged has none."""
    lost = {name.rpartition("-seed")[0] for name in arms.diverged(results)}
    tokens = {arms.arm(each): each["tokens"] for each in results}
    told = {}
    for name, own in arms.losses(results).items():
        if (parts := _NAME.fullmatch(name)) and name not in lost:
            told[Setting(tokens[name], parts["arm"], float(parts["rate"]))] = own
    return told


def best(told: Mapping[Setting, Losses], tokens: int, arm: str) -> Setting | None:
    """The setting of an arm and budget with the lowest mean loss, of those with most seeds."""
    those = [each for each in told if each[:2] == (tokens, arm)]
    return min(those, key=lambda each: (-len(told[each]), interval(told[each].values()).mean),
               default=None)


def table(results: Sequence[Result]) -> str:
    """A line each arm and budget, a column each rate; then the gain where each has its best."""
    told = losses(results)
    rates = sorted({each.rate for each in told})
    budgets = sorted({each.tokens for each in told})
    lines = [f"{'loss at a rate of':<28}" + "".join(f"{rate:>32g}" for rate in rates)]
    for tokens in budgets:
        for arm in ARMS:
            cells = [_cell(told.get(Setting(tokens, arm, rate))) for rate in rates]
            lines.append(f"{f'{NAMES[arm]}, {short(tokens)} tokens':<28}"
                         + "".join(f"{cell:>32}" for cell in cells))
    lines.append("")
    for tokens in budgets:
        alone, memory = (best(told, tokens, arm) for arm in ARMS)
        if alone and memory and (gap := paired(told[memory], told[alone])):
            lines.append(f"{short(tokens)} tokens: rho 0.4 at {memory.rate:g} less experts alone "
                         f"at {alone.rate:g}: {gap.signed()} [{gap.count}]")
    lines += [f"{name}: diverged" for name in arms.diverged(results)]
    return "\n".join(lines)


def _cell(own: Losses | None) -> str:
    return "-" if own is None else f"{interval(own.values())} [{len(own)}]"


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each budget: losses against the rate."""
    told = losses(results)
    budgets = sorted({each.tokens for each in told})
    drawn, axes = figures.panels(max(1, len(budgets)))
    for each, tokens in zip(axes, budgets, strict=False):
        for arm in ARMS:
            rates = sorted(one.rate for one in told if one[:2] == (tokens, arm))
            means = [interval(told[Setting(tokens, arm, rate)].values()) for rate in rates]
            figures.points(each, rates, means, COLOURS[arm])
            each.plot(rates, [one.mean for one in means], color=COLOURS[arm], linewidth=1.2,
                      label=NAMES[arm])
        each.set_xscale("log")
        each.set_xticks(shown := sorted({one.rate for one in told}), [f"{x:g}" for x in shown])
        each.minorticks_off()
        each.set_xlabel("the backbone's learning rate")
        each.set_ylabel("validation loss (nats a token)")
        each.legend(frameon=False)
        figures.title(each, f"{short(tokens)} tokens")
    return drawn
