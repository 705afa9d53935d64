"""`bench step` runs the real step of `tiny` on a CPU, and says what it cannot know."""

import json

import jax
import pytest

from engram_jax.benchmarks import step
from engram_jax.benchmarks.experts import expert_benchmark
from engram_jax.cli import main
from engram_jax.config import MoEConfig
from engram_jax.costs.breakdown import OTHER, SCOPES
from engram_jax.recipes import tiny
from engram_jax.settings import changed
from engram_jax.training import placement

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.mark.parametrize(("kind", "peak"), [
    ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("cpu", None),
    ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989.4e12)])
def test_peaks(kind, peak):
    assert step.peak_flops(kind) == peak


@pytest.fixture(scope="module")
def measured():
    run = changed(tiny(), {"model.depth": 2, "data.batch_size": 2, "data.sequence_length": 32})
    return step.step_benchmark(run, placement.make_mesh(1, 1), steps=2, profiled=1)


@pytest.mark.slow
def test_a_step_on_a_cpu(measured):
    assert measured["device"] == jax.devices()[0].device_kind
    assert measured["tokens_per_s"] == pytest.approx(64 / measured["step_s"])
    assert measured["mfu"] is None
    assert "peak" in measured["mfu_reason"]
    assert json.loads(json.dumps(measured)) == measured


@pytest.mark.slow
def test_a_profile_tells_the_parts(measured):
    parts = measured["by_scope"]
    assert set(parts) <= {*SCOPES, OTHER}
    for name in ("attention", "experts", "head", "optimizer", "lookup", "row_update"):
        assert parts[name] > 0, name
    assert 0 < sum(parts.values()) < 20 * measured["step_s"], "threads add up, loops do not"


def test_sizes_are_of_their_benchmarks(capsys):
    for words in (["bench", "step", "--size", "4b"], ["bench", "offload", "--size", "27b"],
                  ["bench", "hash", "--size", "tiny"], ["bench", "hash", "--mesh", "1x1"]):
        assert main.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_cut_is_of_the_papers_model():
    run = step.cut_27b()
    assert (run.model.width, run.model.depth, run.model.moe.experts) == (2560, 4, 55)


def test_one_token_among_many_experts_needs_no_more_room_than_the_picked_ones():
    measured = expert_benchmark(MoEConfig(experts=24, top_k=3, shared=0, expert_ffn=32), 64, 2)
    assert measured["ratio"] == pytest.approx(measured["all_ms"] / measured["picked_ms"])
    few, many = measured["picked_temporary_bytes"], measured["all_temporary_bytes"]
    assert many < few + 64 * 32 * 4, "less than one more expert's matrix"
