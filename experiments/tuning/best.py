"""The settings that each kind of memory does best with, of the 36 trials."""

from engram_jax.config import RunConfig
from experiments.tuning.configs import BEST, TRIALS_BY_ARM


def tuned(run: RunConfig) -> RunConfig:
    """The run with the settings of its kind's best trial."""
    kind = ("engram" if run.model.engram is not None else
            "over-encoding" if run.model.over_encoding is not None else "no-memory")
    return TRIALS_BY_ARM[BEST[kind]].on(run)
