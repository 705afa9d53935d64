"""A memory against its controls."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from engram_jax.analysis import arms, figures
from engram_jax.analysis.arms import Result
from engram_jax.analysis.statistics import interval
from engram_jax.config import KEYS

FIGURE = "loss_by_keys.png"
BASELINE = "no-memory"
NAMES = {BASELINE: "no memory", "ngrams": "n-grams\n(Engram)",
         "shuffled": "another text's\nn-grams", "random": "random rows"}


def table(results: Sequence[Result]) -> str:
    """Every arm, against no memory at the same FLOPs."""
    return arms.table(results, BASELINE)


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each text, a row for each arm."""
    texts = arms.by_text(results)
    drawn, axes = figures.panels(len(texts), 3.2)
    for each, (text, found) in zip(axes, texts.items(), strict=True):
        losses = arms.losses(found)
        names = [name for name in (BASELINE, *KEYS) if name in losses]
        seeds = [list(losses[name].values()) for name in names]
        figures.arms(each, [NAMES[name] for name in names], [interval(s) for s in seeds], seeds,
                     [figures.BLUE if name == "ngrams" else figures.DARK for name in names])
        figures.title(each, text)
        each.set_xlabel("validation loss (nats a token); a dot a seed,\na line the mean's 95 %")
    return drawn
