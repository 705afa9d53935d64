"""Does a train step's time depend on the size of the table?

Row-wise: this library's step, gradients of rows and row-wise RMSProp. Dense: the same model with
the table differentiated as a parameter and updated by optax's Adam, as frameworks do by default.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from engram_jax import recipes
from engram_jax.config import RunConfig
from engram_jax.hashing.addressing import Addressing, address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.settings import changed
from engram_jax.tables.layout import gather_rows
from engram_jax.training.state import init_state
from engram_jax.training.step import Batch, mean_loss, row_ids, train_step

ROWS = (100_000, 1_000_000, 10_000_000)
STEPS = 9


def table_benchmark(rows: tuple[int, ...] = ROWS, steps: int = STEPS) -> dict[str, Any]:
    """Milliseconds of a step of `tiny` by the table's rows, row-wise and dense.

    Returns:
      `rows`, `dim`, and by size `row_wise_ms` and `dense_ms` (medians of `steps` steps); `growth`,
      the slowest row-wise step over the fastest.
    """
    runs = [with_rows(recipes.tiny(), size) for size in rows]
    ours = milliseconds([row_wise(run) for run in runs], steps)
    dense = milliseconds([_dense(run) for run in runs], steps)
    engram = recipes.tiny().model.engram
    assert engram is not None
    return {
        "rows": list(rows),
        "dim": engram.head_dim,
        "row_wise_ms": ours,
        "dense_ms": dense,
        "growth": max(ours) / min(ours),
        "dense_over_row_wise": [d / r for d, r in zip(dense, ours, strict=True)],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def with_rows(run: RunConfig, rows: int) -> RunConfig:
    engram = run.model.engram
    assert engram is not None
    orders = len(engram.rows_per_head)
    return changed(run, {"model.engram.rows_per_head": (rows // engram.total_heads,) * orders})


def milliseconds(compared: list[Callable[[Batch], Any]], steps: int) -> list[float]:
    """Median time of each step function, after one call that compiles.

    They take turns, on another batch each time, so that a machine whose speed drifts slows them
    all alike.
    """
    run, times = recipes.tiny(), []
    for number in range(steps + 1):
        batch = jax.block_until_ready(jax.device_put(zipf_batch(run, number)))
        times.append([_seconds(step, batch) for step in compared])
    return [1e3 * statistics.median(column) for column in zip(*times[1:], strict=True)]


def _seconds(step: Callable[[Batch], Any], batch: Batch) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step(batch))
    return time.perf_counter() - start


def zipf_batch(run: RunConfig, seed: int) -> dict[str, np.ndarray]:
    """Tokens with the frequencies of text (Zipf), so that rows repeat as they do there."""
    shape = (run.data.batch_size, run.data.sequence_length + 1)
    drawn = np.random.default_rng(seed).zipf(1.2, shape)
    tokens = (drawn % run.model.vocab_size).astype(np.int32)
    return {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:],
            "starts_BT": np.zeros((shape[0], shape[1] - 1), bool)}


def _addressing(run: RunConfig) -> Addressing:
    return address(run.model, CompressedVocabulary.identity(run.model.vocab_size), 0)


def row_wise(run: RunConfig) -> Callable[[Batch], Any]:
    state = jax.jit(lambda: init_state(run))()
    step = jax.jit(train_step(run, _addressing(run)), donate_argnums=0)

    def once(batch: Batch) -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["learning/loss"]

    return once


def _dense(run: RunConfig) -> Callable[[Batch], Any]:
    addressing, transform = _addressing(run), optax.adam(1e-3)
    state = jax.jit(lambda: init_state(run))()
    trained, bias = (state.params, state.tables), state.router_bias
    del state
    opt_state = jax.jit(transform.init)(trained)

    def step(trained: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        def loss(trained: Any) -> jax.Array:
            params, tables = trained
            rows = gather_rows(run.model, tables, row_ids(run, addressing, batch))
            return mean_loss(params, rows, bias, batch, run)[0]

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = transform.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))

    def once(batch: Batch) -> jax.Array:
        nonlocal trained, opt_state
        trained, opt_state, value = compiled(trained, opt_state, batch)
        return value

    return once
