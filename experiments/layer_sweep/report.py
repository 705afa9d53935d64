"""Loss by the block that the module stands before, less that without memory."""

import itertools
from collections.abc import Sequence

from matplotlib.figure import Figure

from engram_jax.results import arms, figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import Interval, paired
from experiments import published

FIGURE = "loss_by_layer.png"
BASELINE = "no-memory"


def table(results: Sequence[Result]) -> str:
    """Every arm against no memory, and all with a memory against each other."""
    losses = {name: own for name, own in arms.losses(results).items() if name != BASELINE}
    gaps = {f"{name} less {other}": paired(losses[name], losses[other])
            for other, name in itertools.combinations(losses, 2)}
    return "\n".join([arms.table(results, BASELINE), "", *(
        f"{names:<24}{gap.signed():>28}" for names, gap in gaps.items() if gap is not None)])


def figure(results: Sequence[Result]) -> Figure:
    """Ours at equal seeds, and the paper's."""
    losses = arms.losses(results)
    gaps = {name: gap for name, own in losses.items()
            if (gap := paired(own, losses.get(BASELINE, {}))) is not None}
    layers = [gap for name, gap in gaps.items() if name.startswith("layer-")]
    drawn, axes = figures.panels(2)
    figures.points(axes[0], range(len(layers)), layers, figures.BLUE)
    for name, gap in gaps.items():
        if name.startswith("layers-"):
            blocks = name.removeprefix("layers-").replace("-", " and ")
            figures.level(axes[0], gap.mean, f"split over {blocks}", figures.GREEN)
    figures.title(axes[0], f"{results[0]['text']}, 95 % over seeds")
    paper = [Interval(loss - published.NO_MEMORY, None, None, 1) for loss in published.LAYERS]
    figures.points(axes[1], range(len(paper)), paper, figures.ORANGE)
    split = published.ABLATIONS["reference"] - published.NO_MEMORY
    figures.level(axes[1], split, "split over 1 and 5", figures.GREEN)
    figures.title(axes[1], "the paper")
    for each, count in zip(axes, (len(layers), len(paper)), strict=True):
        figures.level(each, 0, "no memory")
        each.margins(y=0.1)
        each.set_xticks(range(count))
        each.set_xlabel("block that the module stands before")
        each.set_ylabel("loss less that without memory (nats)")
    return drawn
