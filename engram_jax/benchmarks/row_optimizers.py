"""What each optimizer of tables costs: a step's time and the state that it keeps of a row."""

from typing import Any

import jax

from engram_jax import recipes
from engram_jax.benchmarks.table import milliseconds, row_wise, with_rows
from engram_jax.config import TABLE_OPTIMIZERS, RunConfig
from engram_jax.settings import changed
from engram_jax.tables.row_optimizers import row_optimizer, state_bytes

ROWS = 1_000_000
STEPS = 9


def row_optimizer_benchmark(rows: int = ROWS, steps: int = STEPS) -> dict[str, Any]:
    """Milliseconds of a step of `tiny` with a table of `rows` rows, by the table's optimizer.

    Returns:
      `rows`, `dim`, and by optimizer `step_ms` (medians of `steps` steps that took turns) and
      `state_bytes_per_row`, beside the row itself.
    """
    base = with_rows(recipes.tiny(), rows)
    runs = {name: _with_optimizer(base, name) for name in TABLE_OPTIMIZERS}
    times = milliseconds([row_wise(run) for run in runs.values()], steps)
    assert base.model.engram is not None
    dim = base.model.engram.head_dim
    return {
        "rows": rows,
        "dim": dim,
        "step_ms": dict(zip(runs, times, strict=True)),
        "state_bytes_per_row": {name: state_bytes(row_optimizer(run.optimizer), dim)
                                for name, run in runs.items()},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _with_optimizer(run: RunConfig, name: str) -> RunConfig:
    return changed(run, {"optimizer.table_optimizer": name})
