"""Loss by the block that the module stands before."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from engram_jax.analysis import arms, figures
from engram_jax.analysis.arms import Result
from engram_jax.analysis.statistics import Interval, interval
from experiments import published

FIGURE = "loss_by_layer.png"
BASELINE = "no-memory"


def table(results: Sequence[Result]) -> str:
    """Every arm against no memory."""
    return arms.table(results, BASELINE)


def figure(results: Sequence[Result]) -> Figure:
    """Ours, and the paper's."""
    losses = {name: interval(found.values()) for name, found in arms.losses(results).items()}
    drawn, axes = figures.panels(2)
    layers = {int(name.removeprefix("layer-")): found for name, found in losses.items()
              if name.startswith("layer-")}
    figures.points(axes[0], list(layers), list(layers.values()), figures.BLUE)
    for name, found in losses.items():
        if name.startswith("layers-"):
            blocks = name.removeprefix("layers-").replace("-", " and ")
            figures.level(axes[0], found.mean, f"split over {blocks}", figures.GREEN)
    figures.level(axes[0], losses[BASELINE].mean, "no memory, same FLOPs")
    figures.title(axes[0], f"{results[0]['text']}, 95 % over seeds")
    figures.points(axes[1], range(len(published.LAYERS)),
                   [Interval(loss, None, None, 1) for loss in published.LAYERS], figures.ORANGE)
    figures.level(axes[1], published.ABLATIONS["reference"], "split over 1 and 5", figures.GREEN)
    figures.level(axes[1], published.NO_MEMORY, "no memory")
    figures.title(axes[1], "the paper")
    for each, count in zip(axes, (len(layers), len(published.LAYERS)), strict=True):
        each.set_xticks(range(count))
        each.set_xlabel("block that the module stands before")
        each.set_ylabel("validation loss (nats a token)")
    return drawn
