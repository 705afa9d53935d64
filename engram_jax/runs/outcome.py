"""What result.json says of a finished run."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from engram_jax.config import RunConfig
from engram_jax.costs.accounting import account
from engram_jax.runs.evaluate import Evaluation


def outcome(
    run: RunConfig, evaluation: Evaluation, rows: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """The fields of result.json.

    Args:
      run: the run.
      evaluation: of its last state.
      rows: that it logged; tokens a second are the median's of its steps.
    """
    numbers = account(run)
    seconds = [row["perf/step_time_seconds"] for row in rows if row.get("perf/step_time_seconds")]
    memory = run.model.engram or run.model.over_encoding
    tokens = run.data.batch_size * run.data.sequence_length
    return {
        "name": run.name,
        "memory": _memory_kind(run),
        "slots": memory.rows_per_head[0] if memory else 0,
        "memory_params": numbers.engram_params,
        "total_params": numbers.total_params,
        "active_params": numbers.active_params,
        "experts": run.model.moe.experts if run.model.moe else 0,
        "rho": numbers.rho,
        "flops_per_token": numbers.flops_per_token,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "validation_tokens": evaluation.tokens,
        "tokens_per_s": tokens / statistics.median(seconds) if seconds else 0.0,
        "text": " + ".join(epath.Path(path).name for path in run.data.sources),
        "seed": run.training.seed,
        "steps": run.training.steps,
        "tokens": run.training.steps * tokens,
    }


def _memory_kind(run: RunConfig) -> str:
    if run.model.engram and run.model.over_encoding:
        return "Engram and OverEncoding"
    if run.model.engram:
        return "Engram"
    return "OverEncoding" if run.model.over_encoding else "no memory"
