"""`bench step` runs the real step of `tiny` on a CPU, and says what it cannot know."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from engram_jax.benchmarks import experts, step
from engram_jax.benchmarks.experts import expert_benchmark
from engram_jax.cli import main
from engram_jax.config import MoEConfig
from engram_jax.costs.breakdown import OTHER, SCOPES
from engram_jax.costs.hlo import parse
from engram_jax.recipes import tiny
from engram_jax.settings import changed
from engram_jax.training import placement

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.mark.parametrize(("kind", "peak"), [
    ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("cpu", None),
    ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989.4e12),
    ("TPU v5e", 197e12), ("TPU v6e", 918e12), ("TPU v6 lite", 918e12), ("TPU v5x", None),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 NVL", 835.5e12), ("NVIDIA H1000", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)])
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
    assert measured["attention"] == "xla"
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


HLO = """HloModule step, entry_computation_layout={()->f32[]}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %loop_add_fusion.12 = f32[4]{0} add(%a, %a), metadata={op_name="jit(step)/sinkhorn/add"}
  %copy.3 = f32[4]{0} copy(%loop_add_fusion.12), metadata={op_name="jit(step)/experts/copy"}
  ROOT %custom-call.7 = f32[4]{0} custom-call(%copy.3), custom_call_target="gemm", \
metadata={op_name="jit(step)/head/dot_general"}
}
""".replace("\\\n", "")


def event(name, ns, **stats):
    return SimpleNamespace(name=name, duration_ns=ns, stats=stats.items())


def plane(name, **lines):
    return SimpleNamespace(name=name, lines=[
        SimpleNamespace(name=line, events=events) for line, events in lines.items()])


def test_a_gpu_s_kernels_belong_to_their_operations_and_none_is_lost():
    """Those of a graph of launches are only named, and those of a library not even that; what the
    host says of the same operations does not count again, nor what is told of the streams."""
    device = plane("/device:GPU:0", **{
        "Stream #14(Compute)": [
            event("loop_add_fusion_12", 5e8), event("kernel", 1e9, hlo_op="copy.3"),
            event("nvjet_sm90_tss", 2e9), event("gemm", 3e9, hlo_op="custom-call.7")],
        "XLA Ops": [event("copy.3", 1e9, hlo_op="copy.3"), event("custom-call.7", 3e9)]})
    host = plane("/host:CPU", Streams=[event("loop_add_fusion.12", 7e9)])
    assert step.by_scope(parse(HLO), [SimpleNamespace(planes=[host, device])]) == {
        "sinkhorn": 0.5, "experts": 1.0, step.UNNAMED: 2.0, "head": 3.0}
    assert step.by_scope(parse(HLO), [SimpleNamespace(planes=[host])]) == {"sinkhorn": 7.0}


def test_sizes_are_of_their_benchmarks(capsys):
    for words in (["bench", "step", "--size", "4b"], ["bench", "offload", "--size", "27b"],
                  ["bench", "hash", "--size", "tiny"], ["bench", "hash", "--mesh", "1x1"],
                  ["bench", "step", "--requests", "3"], ["bench", "offload", "--requests", "49"],
                  ["bench", "offload", "--requests", "-1"]):
        assert main.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_cut_is_of_the_papers_model():
    run = step.cut_27b()
    assert (run.model.width, run.model.depth, run.model.moe.experts) == (2560, 4, 55)
    assert run.training.accumulate == 8, "one sequence of a device at a time"
    assert run.data.batch_size == 8 * jax.device_count()


def test_one_token_among_many_experts_needs_no_more_room_than_the_picked_ones():
    measured = expert_benchmark(
        MoEConfig(experts=24, top_k=3, shared=0, expert_ffn=32), 64, 2, tokens=40)
    for load in ("even", "lopsided"):
        flops = 18 * 40 * 3 * 64 * 32
        assert measured[f"{load}_teraflops"] == pytest.approx(
            flops / measured[f"{load}_ms"] / 1e9)
    assert measured["ratio"] == pytest.approx(measured["all_ms"] / measured["picked_ms"])
    few, many = measured["picked_temporary_bytes"], measured["all_temporary_bytes"]
    assert many < few + 64 * 32 * 4, "less than one more expert's matrix"


def test_a_batch_computes_all_products_that_are_counted():
    """What nobody asks for a compiler leaves out: for gradients alone, the last forward product."""
    matrices = {"gate": jnp.ones((4, 8, 16)), "up": jnp.ones((4, 8, 16)),
                "down": jnp.ones((4, 16, 8))}
    program = jax.jit(functools.partial(experts._both_ways, 4)).lower(
        matrices, jnp.ones((40, 8)), jnp.zeros((40, 2), jnp.int32), jnp.ones((40, 2))).compile()
    of_blocks = [site for site in parse(program.as_text()).walk()
                 if site.instruction.opcode == "dot" and not site.exact]
    assert len(of_blocks) == experts.PRODUCTS
