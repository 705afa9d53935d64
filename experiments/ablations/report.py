"""What each part of the module is worth, against the reference at equal seeds."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from engram_jax.results import arms, figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import paired
from experiments import published

FIGURE = "loss_by_ablation.png"
BASELINE = "reference"


def table(results: Sequence[Result]) -> str:
    """Every arm against the reference."""
    return arms.table(results, BASELINE)


def figure(results: Sequence[Result]) -> Figure:
    """Differences of ours, and the paper's where it has the arm."""
    losses = arms.losses(results)
    gaps = {name: paired(own, losses[BASELINE]) for name, own in losses.items()
            if name != BASELINE}
    ours = {name: gap for name, gap in sorted(
        gaps.items(), key=lambda item: item[1].mean if item[1] else 0.0) if gap is not None}
    drawn, axes = figures.panels(2, 4.6)
    seeds = [[losses[name][seed] - losses[BASELINE][seed] for seed in losses[name]
              if seed in losses[BASELINE]] for name in ours]
    told = [name if name == "4-grams" else name.replace("-", " ") for name in ours]
    figures.arms(axes[0], told, list(ours.values()), seeds,
                 [figures.DARK if name == "no-memory" else figures.BLUE for name in ours])
    figures.title(axes[0], f"{results[0]['text']}, {len(losses[BASELINE])} seeds")
    axes[0].set_xlabel("loss less the reference's (nats a token);\na dot a seed, a line 95 %")
    axes[0].axvline(0, color=figures.DARK, linewidth=1)
    for each in axes:
        each.locator_params(axis="x", nbins=6)
    paper = {name: loss - published.ABLATIONS[BASELINE]
             for name, loss in published.ABLATIONS.items()}
    for row, name in enumerate(ours):
        if name in paper:
            axes[1].plot(paper[name], row, "o", color=figures.ORANGE, markersize=7)
    axes[1].set_yticks(range(len(ours)), [""] * len(ours))
    axes[1].set_ylim(len(ours) - 0.5, -0.5)
    axes[1].axvline(0, color=figures.DARK, linewidth=1)
    figures.plain(axes[1], "x")
    figures.title(axes[1], "the paper, one run each")
    axes[1].set_xlabel("loss less the reference's (nats a token)")
    return drawn
