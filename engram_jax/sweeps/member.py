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
    again would not mend it, so it is not trained again, and the other runs of the sweep are none
    the worse. Other errors are those of `train`.
    """
    records = RunDirectory(folder / run.name)
    if (before := result_before(run, folder, say)) is not None:
        return before
    try:
        return train(run, records.path, say, mesh)
    except Diverged as error:
        say(f"{run.name}: {error}")
        records.give_up(str(error))
        return _lost(run, records)


def result_before(
    run: RunConfig, folder: epath.Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The result of a run that has come to its end before, or diverged; else None.

    Raises:
      UserError: its folder holds another run.
    """
    records = RunDirectory(folder / run.name)
    if (result := records.result()) is not None:
        records.check(run)
        say(f"{run.name}: done before, loss {result['loss']:.4f} (in {records.path})")
        return result
    if line := records.divergence():
        records.check(run)
        say(f"{run.name}: {line}; that was before, remove {records.path / 'diverged.json'} to try "
            "again")
        return _lost(run, records)
    return None


def _lost(run: RunConfig, records: RunDirectory) -> dict[str, Any]:
    return outcome(run, Evaluation(math.nan, math.nan, 0), records.metrics())
