"""One model and one memory; its table is trained by each optimizer, at several rates.

The first seed chooses among the rates; the others repeat the paper's and the largest.
"""

import dataclasses
from collections.abc import Sequence

from engram_jax.config import TABLE_OPTIMIZERS, RunConfig
from engram_jax.recipes import tiny
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.tokens import configs as tokens

PAPER = 5.0  # rate of the tables over the backbone's
LARGEST = 20.0
MULTIPLIERS = (1.25, PAPER, LARGEST)
SCALES = ("tiny", "long")
STEPS = 200  # of tiny
LONG = "memory_scaling-engram-65536-4x"  # an arm of `tokens`: 2.6 times the tokens, tuned rates
LONG_OPTIMIZERS = ("row_rmsprop", "dense_adam", "row_adam")


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """A seed gives every arm the same start and the same order of the text.

    Of tiny seed after seed; of long the largest rate with every seed, then the paper's.
    """
    if scale == "long":
        return [run for multiplier in (LARGEST, PAPER)
                for run in seeded(long_arms((multiplier,)), seeds)]
    first, *others = seeds
    return [*seeded(arms(MULTIPLIERS), [first]), *seeded(arms((PAPER, LARGEST)), others)]


def arms(multipliers: Sequence[float]) -> list[RunConfig]:
    """Every optimizer at these rates, and row Adam's bfloat16 table at the paper's."""
    made = [_arm(optimizer, multiplier, "float32")
            for optimizer in TABLE_OPTIMIZERS for multiplier in multipliers]
    return [*made, _arm("row_adam", PAPER, "bfloat16")]


def long_arms(multipliers: Sequence[float]) -> list[RunConfig]:
    """An arm of `tokens` with each of three optimizers, named OPTIMIZER-xRATE-4x."""
    base = next(arm for arm in tokens.arms("tiny")["memory_scaling"] if arm.name == LONG)
    return [dataclasses.replace(
        changed(base, {"optimizer.table_optimizer": optimizer,
                       "optimizer.table_multiplier": multiplier}),
        name=f"{optimizer}-x{multiplier:g}-4x")
        for multiplier in multipliers for optimizer in LONG_OPTIMIZERS]


def _arm(optimizer: str, multiplier: float, dtype: str) -> RunConfig:
    return changed(tiny(), {
        "name": f"{optimizer}{'-bf16' if dtype == 'bfloat16' else ''}-x{multiplier:g}",
        "model.engram.table_dtype": dtype, "optimizer.table_optimizer": optimizer,
        "optimizer.table_multiplier": multiplier, "training.steps": STEPS,
        "training.checkpoint_every": 0})
