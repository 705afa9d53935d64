"""One model and one memory; its table is trained by each optimizer at three rates, three seeds."""

import dataclasses

from engram_jax.config import TABLE_OPTIMIZERS, RunConfig
from engram_jax.recipes import tiny

SEEDS = (0, 1, 2)
MULTIPLIERS = (1.25, 5.0, 20.0)  # 5 is the paper's
STEPS = 200


def runs() -> list[RunConfig]:
    """Seed after seed; a seed gives every arm the same start and the same order of the text."""
    return [run for seed in SEEDS for run in _of_seed(seed)]


def _of_seed(seed: int) -> list[RunConfig]:
    arms = [_run(seed, optimizer, multiplier, "float32")
            for optimizer in TABLE_OPTIMIZERS for multiplier in MULTIPLIERS]
    return [*arms, _run(seed, "row_adam", 5.0, "bfloat16")]


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
