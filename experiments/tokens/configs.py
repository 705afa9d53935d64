"""The other experiments' arms on one, four, sixteen (and 64) times their tokens.

Groups have a baseline each, which comes first. The order is that of importance, so that a sweep
which is cut has told the most: group by group, in each seed by seed, in each budget by budget.
"""

import dataclasses
from collections.abc import Callable, Sequence

from engram_jax.config import RunConfig
from engram_jax.costs.accounting import account
from engram_jax.costs.allocation import allocate, with_flops
from engram_jax.sweeps.sweep import seeded
from experiments.ablations import configs as ablations
from experiments.allocation import configs as allocation
from experiments.layer_sweep import configs as layer_sweep
from experiments.memory_scaling import configs as memory_scaling
from experiments.tuning.best import tuned

TEXT = "runs/packages.jsonl"  # `python -m experiments.packages` writes it
VALIDATION = 0.003  # of 165 MB: about as many tokens as the other experiments validate on


def _allocation() -> list[RunConfig]:
    base, memory = allocation.SCALES["tiny"][1]
    return [dataclasses.replace(allocate(base, rho, memory).run, name=f"rho-{rho:g}")
            for rho in (1.0, 0.8, 0.6, 0.4)]


def _ablations() -> list[RunConfig]:
    base = ablations.SCALES["tiny"]()
    cost = account(base).flops_per_token
    wanted = ("reference", "no-gate", "no-convolution", "one-branch", "no-compression", "no-memory")
    arms = {arm.name: arm for arm in ablations.arms(base)}
    return [with_flops(arms[name], cost) for name in wanted]


def _memory_scaling() -> list[RunConfig]:
    return _without_seed(memory_scaling.runs("tiny", (0,)),
                         "no-memory", "engram-1024", "engram-65536", "over-encoding-4096",
                         "over-encoding-65536")


def _layer_sweep() -> list[RunConfig]:
    return _without_seed(layer_sweep.runs("tiny", (0,)), "layer-1", "layer-0", "layer-3", "layer-5")


def _without_seed(runs: Sequence[RunConfig], *names: str) -> list[RunConfig]:
    arms = {run.name.removesuffix("-seed0"): run for run in runs}
    return [dataclasses.replace(arms[name], name=name) for name in names]


GROUPS: dict[str, Callable[[], list[RunConfig]]] = {
    "allocation": _allocation,
    "ablations": _ablations,
    "memory_scaling": _memory_scaling,
    "layer_sweep": _layer_sweep,
}
EXTREMES = ("rho-1", "rho-0.8", "rho-0.4")
SCALES: dict[str, tuple[int, ...]] = {"tiny": (1, 4, 16), "long": (64,)}  # times the tokens


def arms(scale: str) -> dict[str, list[RunConfig]]:
    """For each group its arms, budget after budget, named GROUP-ARM-TIMESx."""
    grouped = {}
    for group, make in GROUPS.items():
        made = [arm for arm in make() if scale == "tiny" or arm.name in EXTREMES]
        grouped[group] = [_longer(tuned(arm), group, times)
                          for times in SCALES[scale] for arm in made]
    return grouped


def _longer(arm: RunConfig, group: str, times: int) -> RunConfig:
    return dataclasses.replace(
        arm, name=f"{group}-{arm.name}-{times}x",
        data=dataclasses.replace(arm.data, path=TEXT, validation_fraction=VALIDATION),
        training=dataclasses.replace(arm.training, steps=times * arm.training.steps,
                                     checkpoint_every=100, keep_checkpoints=1))


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every arm with every seed."""
    return [run for group in arms(scale).values() for run in seeded(group, seeds)]
