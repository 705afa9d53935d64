"""Each arm's loss less its group's baseline, at every budget of tokens; the paper's beside it."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from engram_jax.costs.accounting import short
from engram_jax.results import arms, figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import Interval, paired
from experiments import published

FIGURE = "effect_against_tokens.png"
COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.SKY, figures.DARK)
BASELINES = {  # of each group, and what figures call the group
    "allocation": ("rho-1", "experts or memory, less experts alone"),
    "ablations": ("reference", "parts of the module, less the reference"),
    "memory_scaling": ("no-memory", "memory, less no memory"),
    "layer_sweep": ("layer-1", "one block, less block 1"),
}

Effects = Mapping[str, Mapping[int, Interval]]  # arm -> tokens -> loss less the baseline's


def _paper() -> dict[str, dict[str, float]]:
    """The paper's effects by group and arm, nats."""
    budget = dict(published.ALLOCATION["2e20 FLOPs"])
    return {
        "allocation": {f"rho-{rho:g}": budget[rho] - budget[1.0] for rho in (0.8, 0.6, 0.4)},
        "ablations": {name: loss - published.ABLATIONS["reference"]
                      for name, loss in published.ABLATIONS.items() if name != "reference"},
        "memory_scaling": {},  # its slots are none of ours
        "layer_sweep": {f"layer-{layer}": published.LAYERS[layer] - published.LAYERS[1]
                        for layer in (0, 3, 5)},
    }


def split(name: str) -> tuple[str, str, int]:
    """Group, arm and times of an arm's name."""
    group, _, rest = name.partition("-")
    arm, _, times = rest.rpartition("-")
    return group, arm, int(times.removesuffix("x"))


def effects(results: Sequence[Result], group: str) -> Effects:
    """What is told of a group so far; arms and budgets without their baseline are left out."""
    losses, tokens = arms.losses(results), {arms.arm(each): each["tokens"] for each in results}
    lost = {name.rpartition("-seed")[0] for name in arms.diverged(results)}
    baseline, told = BASELINES[group][0], dict[str, dict[int, Interval]]()
    for name, own in losses.items():
        there, arm, times = split(name)
        other = f"{group}-{baseline}-{times}x"
        if there != group or arm == baseline or lost & {name, other}:
            continue
        if (gap := paired(own, losses.get(other, {}))) is not None:
            told.setdefault(arm, {})[tokens[name]] = gap
    return told


def table(results: Sequence[Result]) -> str:
    """For each group an arm a line, a column a budget; the paper's effect last."""
    parts = []
    for group, (baseline, _) in BASELINES.items():
        told, paper = effects(results, group), _paper()[group]
        budgets = sorted({tokens for each in told.values() for tokens in each})
        if not told:
            continue
        lines = [f"{group + ' less ' + baseline:<32}"
                 + "".join(f"{short(tokens) + ' tokens':>36}" for tokens in budgets)
                 + f"{'the paper':>12}"]
        for arm, each in told.items():
            cells = [f"{each[tokens].signed()} [{each[tokens].count}]" if tokens in each else "-"
                     for tokens in budgets]
            value = f"{paper[arm]:+.4f}" if arm in paper else "-"
            lines.append(f"{arm:<32}" + "".join(f"{cell:>36}" for cell in cells) + f"{value:>12}")
        parts.append("\n".join(lines))
    done = sorted({(split(arms.arm(each))[0], each["tokens"], each["seed"]) for each in results})
    seeds = [f"{group}: {short(tokens)} tokens, seeds "
             f"{', '.join(str(seed) for *key, seed in done if key == [group, tokens])}"
             for group, tokens in dict.fromkeys((group, tokens) for group, tokens, _ in done)]
    lost = [f"{name}: diverged" for name in arms.diverged(results)]
    return "\n\n".join([*parts, "\n".join([*seeds, *lost])])


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each group that has begun: effects against tokens, the paper's as lines."""
    told = {group: own for group in BASELINES if (own := effects(results, group))}
    drawn, axes = figures.panels(2, 4.2, rows=max(1, (len(told) + 1) // 2))
    for each, (group, own) in zip(axes, told.items(), strict=False):
        _draw(each, own, _paper()[group])
        figures.title(each, BASELINES[group][1])
    for each in axes[len(told):]:
        each.set_axis_off()
    return drawn


def _draw(axes: Axes, told: Effects, paper: Mapping[str, float]) -> None:
    figures.level(axes, 0, "")
    for (arm, each), colour in zip(told.items(), COLOURS, strict=False):
        budgets = sorted(each)
        figures.points(axes, budgets, [each[tokens] for tokens in budgets], colour)
        axes.plot(budgets, [each[tokens].mean for tokens in budgets], color=colour, linewidth=1.2,
                  label=arm.replace("-", " "))
        if arm in paper:
            axes.axhline(paper[arm], color=colour, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(sorted({tokens for each in told.values() for tokens in each}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(int(tokens))))
    axes.set_xlabel("tokens trained on; dotted: the paper's effect")
    axes.set_ylabel("loss less the baseline's (nats)")
    axes.legend(frameon=False, fontsize=8)
