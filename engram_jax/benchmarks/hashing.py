"""Tokens hashed in a second: the jitted uint32 hash beside its NumPy int64 twin."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.hashing.ngrams import NgramHash

# The paper's engram-27b over DeepSeek-V3's compressed vocabulary.
PAPER_27B = NgramHash(rows_per_head=(2_262_400, 2_262_400), heads=8, layers=(1, 14),
                      vocab_size=98_627, pad_id=2)

CALLS_A_TURN = 8  # in a row, so that threads and memory are as warm as in steady use


def hash_benchmark(*, batch: int = 8, time_steps: int = 4096, repeats: int = 7,
                   hashing: NgramHash = PAPER_27B) -> dict[str, Any]:
    """Time both hashes of every layer on the same random tokens, in turns, and compare their ids.

    Args:
      batch, time_steps: B and T of the tokens.
      repeats: timed rounds, each of several calls of one and then of the other, after a round
        that warms up; medians over all calls are reported.
      hashing: what to hash with.

    Returns:
      tokens_per_s and numpy_tokens_per_s (each token hashed for all layers), ratio (how many
      times faster the jitted hash is), seconds and numpy_seconds (a call's median), equal (the
      ids agree bit for bit), compile_s, and what was measured: tokens, heads (in all, a layer),
      orders, layers, rows_per_head, device and versions.

    Raises:
      UserError: a size below 1.
    """
    for field, value in (("batch", batch), ("time_steps", time_steps), ("repeats", repeats)):
        require(value >= 1, field, value, "must be at least 1")
    ids_BT = np.random.default_rng(0).integers(
        0, hashing.vocab_size, (batch, time_steps), dtype=np.int32)
    device_ids_BT = jnp.asarray(ids_BT)

    @jax.jit
    def jitted(ids_BT: jax.Array) -> list[jax.Array]:
        return [hashing.row_ids(ids_BT, layer) for layer in hashing.layers]

    def jax_rows() -> list[jax.Array]:
        return jax.block_until_ready(jitted(device_ids_BT))

    def numpy_rows() -> list[np.ndarray]:
        return [hashing.row_ids_numpy(ids_BT, layer) for layer in hashing.layers]

    compile_s, rows = _timed(jax_rows)
    expected = numpy_rows()
    seconds, numpy_seconds = _medians(jax_rows, numpy_rows, repeats)
    return {
        "tokens_per_s": ids_BT.size / seconds,
        "numpy_tokens_per_s": ids_BT.size / numpy_seconds,
        "ratio": numpy_seconds / seconds,
        "seconds": seconds,
        "numpy_seconds": numpy_seconds,
        "equal": all(np.array_equal(a, b) for a, b in zip(rows, expected, strict=True)),
        "compile_s": compile_s,
        "tokens": ids_BT.size,
        "heads": hashing.total_heads,
        "orders": list(range(2, hashing.max_order + 1)),
        "layers": list(hashing.layers),
        "rows_per_head": list(hashing.rows_per_head),
        "device": jax.devices()[0].device_kind,
        "jax_version": jax.__version__,
        "numpy_version": np.__version__,
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _medians(first: Callable[[], Any], second: Callable[[], Any],
             repeats: int) -> tuple[float, float]:
    """Median seconds of two calls made in turns, so that both meet the same load."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + repeats):
        for call, seconds in zip((first, second), times, strict=True):
            seconds += [_timed(call)[0] for _ in range(CALLS_A_TURN)]
    return statistics.median(times[0][CALLS_A_TURN:]), statistics.median(times[1][CALLS_A_TURN:])
