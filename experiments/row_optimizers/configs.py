"""One model and one memory; its table is trained by each optimizer, at three rates, on three seeds.

The first seed chooses among the rates; the others repeat the paper's.
"""

import dataclasses

from engram_jax.config import TABLE_OPTIMIZERS, RunConfig
from engram_jax.recipes import tiny

SEEDS = (0, 1, 2)
PAPER = 5.0  # rate of the tables over the backbone's
MULTIPLIERS = (1.25, PAPER, 20.0)
STEPS = 200


def runs() -> list[RunConfig]:
    """Seed after seed; a seed gives every arm the same start and the same order of the text."""
    return [run for seed in SEEDS for run in _of_seed(seed)]


def _of_seed(seed: int) -> list[RunConfig]:
    arms = [_run(seed, optimizer, multiplier, "float32")
            for optimizer in TABLE_OPTIMIZERS
            for multiplier in (MULTIPLIERS if seed == SEEDS[0] else (PAPER,))]
    return [*arms, _run(seed, "row_adam", PAPER, "bfloat16")]


def _run(seed: int, optimizer: str, multiplier: float, dtype: str) -> RunConfig:
    base = tiny()
    assert base.model.engram is not None
    engram = dataclasses.replace(base.model.engram, table_dtype=dtype)
    name = f"{optimizer}{'-bf16' if dtype == 'bfloat16' else ''}-x{multiplier:g}-seed{seed}"
    return dataclasses.replace(
        base,
        name=name,
        model=dataclasses.replace(base.model, engram=engram),
        data=dataclasses.replace(base.data, seed=seed),
        optimizer=dataclasses.replace(
            base.optimizer, table_optimizer=optimizer, table_multiplier=multiplier),
        training=dataclasses.replace(
            base.training, seed=seed, steps=STEPS, checkpoint_every=0),
    )
