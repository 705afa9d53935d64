"""One model and one memory; its table is trained by each optimizer, at three rates.

The first seed chooses among the rates; the others repeat the paper's.
"""

from collections.abc import Sequence

from engram_jax.config import TABLE_OPTIMIZERS, RunConfig
from engram_jax.recipes import tiny
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded

PAPER = 5.0  # rate of the tables over the backbone's
MULTIPLIERS = (1.25, PAPER, 20.0)
SCALES = {"tiny": 200}  # steps


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Seed after seed; a seed gives every arm the same start and the same order of the text."""
    first, *others = seeds
    steps = SCALES[scale]
    return [*seeded(arms(steps, MULTIPLIERS), [first]), *seeded(arms(steps, (PAPER,)), others)]


def arms(steps: int, multipliers: Sequence[float]) -> list[RunConfig]:
    """Every optimizer at these rates, and row Adam's bfloat16 table at the paper's."""
    made = [_arm(steps, optimizer, multiplier, "float32")
             for optimizer in TABLE_OPTIMIZERS for multiplier in multipliers]
    return [*made, _arm(steps, "row_adam", PAPER, "bfloat16")]


def _arm(steps: int, optimizer: str, multiplier: float, dtype: str) -> RunConfig:
    return changed(tiny(), {
        "name": f"{optimizer}{'-bf16' if dtype == 'bfloat16' else ''}-x{multiplier:g}",
        "model.engram.table_dtype": dtype, "optimizer.table_optimizer": optimizer,
        "optimizer.table_multiplier": multiplier, "training.steps": steps,
        "training.checkpoint_every": 0})
