"""A memory and its controls, less no memory at equal seeds."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from engram_jax.config import KEYS
from engram_jax.results import arms, figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import paired

FIGURE = "loss_by_keys.png"
BASELINE = "no-memory"
NAMES = {"ngrams": "n-grams\n(Engram)", "shuffled": "another text's\nn-grams",
         "random": "random rows"}


def table(results: Sequence[Result]) -> str:
    """Every arm, against no memory at the same FLOPs."""
    return arms.table(results, BASELINE)


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each text, a row for each arm."""
    texts = arms.by_text(results)
    drawn, axes = figures.panels(len(texts), 3.0)
    for each, (text, runs) in zip(axes, texts.items(), strict=True):
        losses = arms.losses(runs)
        gaps = {keys: gap for keys in KEYS
                if (gap := paired(losses.get(keys, {}), losses[BASELINE])) is not None}
        seeds = [[loss - losses[BASELINE][seed] for seed, loss in losses[keys].items()
                  if seed in losses[BASELINE]] for keys in gaps]
        figures.arms(each, [NAMES[keys] for keys in gaps], list(gaps.values()), seeds,
                     [figures.BLUE if keys == "ngrams" else figures.DARK for keys in gaps])
        each.axvline(0, color=figures.DARK, linewidth=1, linestyle="--")
        figures.title(each, f"{text}; 0 is no memory at the same FLOPs")
        each.set_xlabel("loss less that without memory (nats a token);\na dot a seed, a line 95 %")
    return drawn
