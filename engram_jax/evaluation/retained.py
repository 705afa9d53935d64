"""What is left of a run's scores on tasks when its memory is taken away (the paper's figure 6)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.evaluation import harness
from engram_jax.evaluation.benchmarks import Chosen
from engram_jax.inference.serving import Served
from engram_jax.offload.source import RowSource, Tokens


class NoRows(RowSource):
    """Gives zeros in the place of every row of another source, which its owner closes."""

    def __init__(self, rows: RowSource):
        super().__init__(rows.addressing, rows.end_id)
        self._rows = rows

    def request(
        self, tokens: Tokens, history: np.ndarray | None = None,
        positions: np.ndarray | None = None, count: np.ndarray | None = None,
    ) -> Mapping[str, jax.Array]:
        """As `RowSource.request`."""
        rows = self._rows.request(tokens, history, positions, count)
        return {site: jnp.zeros_like(rows_BTHC) for site, rows_BTHC in rows.items()}

    def close(self) -> None:
        """As `RowSource.close`: there is nothing of its own to close."""


def retained(
    model: Served, chosen: Chosen, include: str = "", limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """By task and metric: the score `with` memory and `without`, and the share that is `retained`.

    Only metrics of which more is better have one; a score of 0 leaves nothing to retain, None.

    Args:
      model, chosen, include, limit, batch_size: as `harness.evaluate` takes them.

    Raises:
      UserError: a run without memory, or as `harness.evaluate`.
    """
    require(bool(model.rows.addressing.sites), "run", model.run.name,
            "has no memory to take away")
    full, bare = (harness.evaluate(one, chosen, include, limit, batch_size) for one in (
        model, dataclasses.replace(model, rows=NoRows(model.rows))))
    return {task: shares for task in full["results"]
            if (shares := _shares(full, bare, task))}


def _shares(
    full: Mapping[str, Any], bare: Mapping[str, Any], task: str
) -> dict[str, dict[str, float | None]]:
    better = full.get("higher_is_better", {}).get(task, {})
    shares: dict[str, dict[str, float | None]] = {}
    for metric, value in full["results"][task].items():
        name = metric.partition(",")[0]
        if better.get(name) and isinstance(value, int | float):
            left = float(bare["results"][task][metric])
            shares[metric.removesuffix(",none")] = {
                "with": float(value), "without": left,
                "retained": left / float(value) if value else None}
    return shares
