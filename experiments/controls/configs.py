"""A memory, the same memory asked for rows that say nothing, and none, all at one cost."""

from collections.abc import Sequence

from engram_jax.config import KEYS, RunConfig
from engram_jax.costs.allocation import matched_baseline
from engram_jax.recipes import engram_3b, small
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.committed import tiny

SCALES = {"tiny": tiny, "small": small, "paper": engram_3b}


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every arm with every seed."""
    base = SCALES[scale]()
    return seeded([matched_baseline(base), *(_with_keys(base, keys) for keys in KEYS)], seeds)


def _with_keys(base: RunConfig, keys: str) -> RunConfig:
    return changed(base, {"name": keys, "model.engram.keys": keys})
