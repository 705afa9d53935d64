"""Every benchmark runs, small, and tells what its docstring says, not how fast it was."""

import dataclasses

import pytest

from engram_jax.benchmarks import offload
from engram_jax.benchmarks.exchange import exchange_benchmark
from engram_jax.benchmarks.gather import gather_benchmark
from engram_jax.benchmarks.row_optimizers import row_optimizer_benchmark
from engram_jax.benchmarks.table import table_benchmark
from engram_jax.config import TABLE_OPTIMIZERS
from engram_jax.settings import changed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compilations")]


def test_table():
    found = table_benchmark(rows=(2000, 4000), steps=1)
    assert len(found["row_wise_ms"]) == len(found["dense_ms"]) == len(found["rows"]) == 2
    assert found["growth"] >= 1


def test_row_optimizers():
    found = row_optimizer_benchmark(rows=2000, steps=1)
    assert set(found["step_ms"]) == set(found["state_bytes_per_row"]) == set(TABLE_OPTIMIZERS)


def test_exchange():
    """Bytes do not depend on the machine: at most 1.35 times the bound, 5 times below the rival."""
    found = exchange_benchmark(steps=1)
    assert 1 <= found["ratio"] <= 1.35
    assert found["gspmd_ratio"] >= 5
    assert found["rounds"] >= 1


def test_gather():
    """Each row of a prompt is read once, and all ways find the same bytes."""
    found = gather_benchmark(batches=(1, 3), steps=16, prefill=512, table_bytes=2**20)
    assert found["equal"]
    for name in ("us_per_step", "us_per_token", "numpy_us_per_step", "bare_gather_us"):
        assert list(found[name]) == ["1", "3"]
    assert found["prefill_rows_read"] == found["prefill_rows_distinct"]
    assert found["prefill_rows_read"] < found["prefill_rows_asked"] == 512 * 24
    assert found["table_gib"] >= 2**-10


def test_offload():
    """Whatever the home, overlapped or cached, the same tokens are generated."""
    work = offload.shortened(offload.tiny(), 3)
    assert (work.sequences, work.slots, work.repeats) == (3, 3, 1)
    model = changed(work.model, {"engram.rows_per_head": (512, 512)})
    work = dataclasses.replace(
        work, model=model, prompt=(5, 20), generated=(2, 4), slots=2, chunk=16, cache_bytes=2**16)
    found = offload.offload_benchmark(work)
    assert found["same_tokens"]
    assert found["baseline_tokens_per_s"] > 0
    ways = [(arm["home"], arm["cache"], arm["host_cache"], arm["filled"]) for arm in found["arms"]]
    for way in (("host", 0, 0, False), ("host", 2**16, 0, False), ("host", 2**16, 0, True),
                ("disk", 0, 2**16, False), ("disk", 0, 2**16, True), ("disk", 2**16, 2**19, True)):
        assert way in ways
    assert not all(arm["overlap"] for arm in found["arms"])
    for arm in found["arms"][1:]:
        assert arm["bytes_per_token"] > 0
        assert 0 <= arm["hidden_share"] <= 1
        there = {"device cache": arm["cache"], "host cache": arm["host_cache"],
                 "host": arm["home"] == "host", "disk": arm["home"] == "disk"}
        assert list(arm["tiers"]) == [name for name, is_there in there.items() if is_there]
        assert list(arm["tiers"].values())[-1]["hit_rate"] == 1
        fastest = next(iter(arm["tiers"].values()))["hit_rate"]
        assert arm["hit_rate"] == (fastest if arm["cache"] or arm["host_cache"] else None)
        assert all(0 < tier["latency_us_p50"] <= tier["latency_us_p99"]
                   for tier in arm["tiers"].values())
