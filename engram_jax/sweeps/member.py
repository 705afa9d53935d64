"""One run of a sweep, wherever it is trained."""

import math
from collections.abc import Callable
from typing import Any

from etils import epath
from jax.sharding import Mesh

from engram_jax.config import RunConfig
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.divergence import Diverged
from engram_jax.runs.evaluate import Evaluation
from engram_jax.runs.outcome import outcome
from engram_jax.runs.train import train


def result_of(
    run: RunConfig, folder: epath.Path, say: Callable[[str], None], mesh: Mesh | None
) -> dict[str, Any]:
    """Train a run in its folder below the sweep's, and return what its result.json holds.

    One that diverges has a result all the same, though no result.json: its loss is NaN. Trying
    again would not mend it, and the other runs of the sweep are none the worse. Other errors are
    those of `train`.
    """
    try:
        return train(run, folder / run.name, say, mesh)
    except Diverged as error:
        say(f"{run.name}: {error}")
        metrics = RunDirectory(folder / run.name).metrics()
        return outcome(run, Evaluation(math.nan, math.nan, 0), metrics)
