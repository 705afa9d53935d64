"""A deep run's costs from a shallow one's: which blocks to compile, and how many times each counts.

What a step takes is a line in the number of its blocks: those of a segment are alike, and are
compiled once. So two cuts of a run, of N blocks and of 2 N, that have all of its dense blocks and
one Engram layer, tell what a block takes, what an Engram layer takes (its scopes), and the rest.
Memory comes out a little low: a further segment has code of its own.
"""

from typing import NamedTuple

from engram_jax.config import RunConfig, require
from engram_jax.hashing.addressing import sites
from engram_jax.settings import changed


class Missing(NamedTuple):
    """What the run has and its smaller cut has not.

    Attributes:
      blocks: how many blocks more, over those that the larger cut has more.
      tables: times as many memory sites.
      fusions: times as many Engram layers.
    """

    blocks: float
    tables: float
    fusions: float


def check(run: RunConfig, depth: int) -> None:
    """Refuse a depth of which nothing follows (UserError)."""
    least = _alike(run) + 2  # a loop that runs once is no loop to a compiler
    require(least <= depth and 2 * depth < run.model.depth, "depth", depth,
            f"must be at least {least}, two blocks of the kind that is repeated, and less than "
            f"half of the {run.model.depth} blocks")


def cut(run: RunConfig, depth: int) -> RunConfig:
    """The run with so many blocks, its first Engram layer among them and no other."""
    settings: dict[str, object] = {"model.depth": depth, "baseline": ""}
    if run.model.engram is not None:
        settings["model.engram.layers"] = (min(run.model.engram.layers[0], _alike(run)),)
    return changed(run, settings)


def missing(run: RunConfig, depth: int) -> Missing:
    """What the run has beyond `cut(run, depth)`."""
    few, engram = cut(run, depth), run.model.engram
    return Missing(
        blocks=(run.model.depth - depth) / depth,
        tables=len(sites(run.model)) / max(1, len(sites(few.model))),
        fusions=1 if engram is None else len(engram.layers))


def _alike(run: RunConfig) -> int:
    """The number of the first block of those that are repeated."""
    if run.model.moe is not None:
        return run.model.moe.dense_layers
    engram = run.model.engram
    return 0 if engram is None else min(engram.layers[0], 1)
