"""What is kept of an accelerator: each benchmark's words or its failure; kernels are counted."""

import json
import subprocess
import sys

from experiments.accelerators import kernels, measure

HLO = """HloModule step, entry_computation_layout={(f32[4])->f32[4]}

%fused_add (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %twice = f32[4]{0} add(%p, %p), metadata={op_name="jit(step)/sinkhorn/add"}
  ROOT %four = f32[4]{0} add(%twice, %twice), metadata={op_name="jit(step)/sinkhorn/add"}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_add, \
metadata={op_name="jit(step)/sinkhorn/while/body/add"}
  ROOT %out = (s32[], f32[4]{0}) tuple(%i, %y)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %s = (s32[], f32[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%graph (g: f32[4]) -> f32[4] {
  %g = f32[4]{0} parameter(0)
  ROOT %gemm = f32[4]{0} custom-call(%g), custom_call_target="gemm", \
metadata={op_name="jit(step)/head/dot_general"}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"20"}}
  %last = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %launched = f32[4]{0} call(%last), to_apply=%graph
}
"""


def test_a_fusion_is_one_kernel_and_runs_as_often_as_its_loop():
    """What a graph of launches calls are kernels, too."""
    assert kernels.kernels(HLO) == {"sinkhorn": 20, "head": 1}


def test_what_is_measured_is_kept_under_its_device_and_failures_cost_the_others_nothing(
    monkeypatch, tmp_path, capsys
):
    def run(command, **_):
        if "attention" in command:
            return subprocess.CompletedProcess(command, 1, "", "a\nout of memory\n")
        if "experts" in command:
            raise subprocess.TimeoutExpired(command, 600)
        assert command[:4] == [sys.executable, "-m", "engram_jax.cli", "bench"]
        return subprocess.CompletedProcess(command, 0, '{"device": "NVIDIA H200", "x": 1}', "")

    monkeypatch.setattr(subprocess, "run", run)
    assert measure.main([str(tmp_path), "experts", "attention", "step-tiny"]) == 1
    [kept] = tmp_path.iterdir()
    assert kept.name == "nvidia-h200-step-tiny.json"
    assert json.loads(kept.read_text()) == {"device": "NVIDIA H200", "x": 1}
    said = capsys.readouterr().out
    assert "exit code 1: out of memory" in said
    assert "not done in 600 s" in said
    assert measure.main([str(tmp_path), "step-small"]) == 0
