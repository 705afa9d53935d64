"""Experts alone and rho 0.4, as `tokens` trains them, at four rates of the backbone.

Budgets come one after another, in each seed by seed, in each the two arms of a rate together.
"""

import dataclasses
from collections.abc import Sequence

from engram_jax.config import RunConfig
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.tokens import configs as tokens

ARMS = ("rho-1", "rho-0.4")  # experts alone, and the arm of `tokens` with most memory
RATES = (4e-3, 8e-3, 16e-3, 32e-3)  # the last is the best of 170 steps, which `tokens` has
SCALES: dict[str, tuple[int, ...]] = {"tiny": (1, 4), "long": (16,)}  # times the tokens


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every arm at every rate with every seed, named ARM-rate-RATE-TIMESx-seedN."""
    arms = {arm.name.removeprefix("allocation-"): arm for arm in tokens.arms("tiny")["allocation"]}
    return [run for times in SCALES[scale] for seed in seeds
            for run in seeded([_at(arms[f"{arm}-{times}x"], f"{arm}-rate-{rate:g}-{times}x", rate)
                               for rate in RATES for arm in ARMS], [seed])]


def _at(arm: RunConfig, name: str, rate: float) -> RunConfig:
    return dataclasses.replace(changed(arm, {"optimizer.learning_rate": rate}), name=name)
