"""As many trials for no memory, for Engram and for OverEncoding, each of its own settings.

A trial that is not spelled out keeps the first trial's other settings, which are those of the
committed experiments. The last two of each kind were added when the first five without memory had
shown that the best rate lay at the edge of the search.
"""

import dataclasses
from collections.abc import Sequence

from engram_jax.config import RunConfig
from engram_jax.costs.accounting import account
from engram_jax.costs.allocation import matched_baseline, with_flops
from engram_jax.recipes import tiny, with_over_encoding
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded

SCALES = {"tiny": 130, "best": 130}  # steps; "best" are the best trials alone, of all seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What one run of the search sets.

    Attributes:
      rate: the backbone's learning rate.
      embedding_std: standard deviation of the token embedding at the start.
      table_optimizer, multiplier: of the tables, and their rate over the backbone's.
      table_std: standard deviation of the tables at the start.
    """

    rate: float = 4e-3
    embedding_std: float = 1.0
    table_optimizer: str = "row_adam"
    multiplier: float = 5.0
    table_std: float = 0.0

    def on(self, run: RunConfig) -> RunConfig:
        """The run with these settings."""
        starts = {f"model.{memory}.table_std": self.table_std
                  for memory in ("engram", "over_encoding")
                  if getattr(run.model, memory) is not None}
        return changed(run, {
            "model.embedding_std": self.embedding_std, **starts,
            "optimizer.learning_rate": self.rate,
            "optimizer.table_optimizer": self.table_optimizer,
            "optimizer.table_multiplier": self.multiplier})


_RMSPROP = Trial(table_optimizer="row_rmsprop", multiplier=20.0)
_OVER = dataclasses.replace(_RMSPROP, embedding_std=9.0)  # 9 memories and embedding share the input

TRIALS: dict[str, tuple[Trial, ...]] = {
    "no-memory": (
        *(Trial(rate=rate, embedding_std=std)
          for std in (1.0, 0.3) for rate in (4e-3, 2e-3, 8e-3, 16e-3, 32e-3)),
        Trial(rate=64e-3),
        Trial(rate=48e-3),
    ),
    "engram": (
        Trial(),
        Trial(rate=8e-3, multiplier=20.0),
        dataclasses.replace(_RMSPROP, multiplier=5.0),
        _RMSPROP,
        dataclasses.replace(_RMSPROP, multiplier=80.0),
        dataclasses.replace(_RMSPROP, rate=8e-3),
        dataclasses.replace(_RMSPROP, rate=16e-3),
        dataclasses.replace(_RMSPROP, rate=8e-3, table_std=0.02),
        dataclasses.replace(_RMSPROP, table_optimizer="dense_adam"),
        dataclasses.replace(_RMSPROP, table_optimizer="dense_adam", rate=8e-3),
        dataclasses.replace(_RMSPROP, rate=32e-3),
        dataclasses.replace(_RMSPROP, rate=32e-3, multiplier=5.0),
    ),
    "over-encoding": (
        Trial(embedding_std=9.0),
        dataclasses.replace(_OVER, multiplier=5.0),
        _OVER,
        dataclasses.replace(_OVER, multiplier=80.0),
        dataclasses.replace(_OVER, rate=8e-3),
        dataclasses.replace(_OVER, rate=16e-3),
        dataclasses.replace(_OVER, rate=8e-3, table_std=1.0),
        dataclasses.replace(_OVER, rate=8e-3, embedding_std=3.0),
        dataclasses.replace(_OVER, rate=8e-3, embedding_std=1.0),
        dataclasses.replace(_OVER, table_optimizer="dense_adam", rate=8e-3),
        dataclasses.replace(_OVER, rate=32e-3),
        dataclasses.replace(_OVER, rate=32e-3, multiplier=5.0),
    ),
}


# By arm, KIND-NUMBER; trial after trial, so that a search that was cut has as many of each kind.
TRIALS_BY_ARM = {f"{kind}-{number}": trials[number]
                 for number in range(max(map(len, TRIALS.values())))
                 for kind, trials in TRIALS.items()}


# The best trial of each kind, as the search has found it.
BEST = {"no-memory": "no-memory-4", "engram": "engram-10", "over-encoding": "over-encoding-5"}


def bases(steps: int) -> dict[str, RunConfig]:
    """The run of each kind, all at one cost of FLOPs."""
    engram = changed(tiny(), {"training.steps": steps, "training.checkpoint_every": 0})
    over = with_flops(with_over_encoding(engram), account(engram).flops_per_token)
    return {"no-memory": matched_baseline(engram), "engram": engram, "over-encoding": over}


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every trial with the first seed alone: a search, which chooses, and no measurement. Of the
    scale "best" what it chose, with every seed."""
    kinds, best = bases(SCALES[scale]), scale == "best"
    arms = [dataclasses.replace(TRIALS_BY_ARM[name].on(kinds[name.rpartition("-")[0]]), name=name)
            for name in (BEST.values() if best else TRIALS_BY_ARM)]
    return seeded(arms, seeds if best else seeds[:1])
