"""The settings that each kind of memory does best with: the best of 36 trials, of one seed."""

from engram_jax.config import RunConfig
from experiments.tuning.configs import TRIALS_BY_ARM

BEST = {"no-memory": "no-memory-4", "engram": "engram-10",
        "over-encoding": "over-encoding-5"}


def tuned(run: RunConfig) -> RunConfig:
    """The run with the settings of its kind's best trial."""
    kind = ("engram" if run.model.engram is not None else
            "over-encoding" if run.model.over_encoding is not None else "no-memory")
    return TRIALS_BY_ARM[BEST[kind]].on(run)
