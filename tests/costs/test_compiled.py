"""FLOPs and estimated time, read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from links import slice_of_links

from engram_jax.costs import compiled
from engram_jax.costs.breakdown import costs
from engram_jax.costs.hlo import parse


def program_of(function, *shapes):
    arrays = [np.ones(shape, np.float32) for shape in shapes]
    return parse(jax.jit(function).lower(*arrays).compile().as_text())


def test_a_scan_of_products():
    program = program_of(
        lambda x, weights: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0],
        (8, 16), (5, 16, 16))
    assert compiled.flops(program) == 5 * 2 * 8 * 16 * 16


def test_a_batched_product():
    program = program_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 4, 5), (3, 5, 6))
    assert compiled.flops(program) == 2 * 3 * 4 * 5 * 6


def test_a_convolution_counts_what_meets_an_element():
    program = program_of(lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")), (2, 7, 4), (3, 4, 6))
    assert compiled.flops(program) == 2 * (2 * 4 * 6) * (3 * 7 - 2)


TPU = """HloModule jit_step

%fused (a: bf16[55,640,2560], b: bf16[55,640,1536]) -> bf16[55,2560,1536] {
  %a = bf16[55,640,2560]{2,1,0} parameter(0)
  %b = bf16[55,640,1536]{2,1,0} parameter(1)
  ROOT %batched = bf16[55,2560,1536]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), \
window={size=55 stride=54 lhs_dilate=55}, dim_labels=0fb_0io->0bf, \
backend_config={"window_config":{"estimated_cycles":"7777"}}
}

ENTRY %main (x: bf16[4096,2560], w: bf16[2560,3072], size: s32[55]) -> bf16[4096,3072] {
  %x = bf16[4096,2560]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[2560,3072]{1,0:T(8,128)(2,1)} parameter(1)
  %size = s32[55]{0} parameter(2)
  %e = bf16[55,2560,1536]{2,1,0} broadcast(%w), \
backend_config={"estimated_cycles":"9223372036854775807"}
  %ragged-dot-none.1 = bf16[4096,1536]{1,0} custom-call(%size, %x, %e), \
custom_call_target="tpu_custom_call"
  %p = bf16[55,640,2560]{2,1,0} broadcast(%w), backend_config={"estimated_cycles":"1000"}
  %q = bf16[55,640,1536]{2,1,0} broadcast(%w)
  %outer = bf16[55,2560,1536]{2,1,0} fusion(%p, %q), kind=kOutput, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"2000"}}
  ROOT %dot = bf16[4096,3072]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
}
"""
DOT, BATCHED, RAGGED = (2 * 4096 * 2560 * 3072, 2 * 55 * 640 * 2560 * 1536,
                        2 * 4096 * 2560 * 1536)


SPEED = compiled.Speed(cycles=1e9, flops=1e14, bytes=1e12)


def test_the_forms_of_tpus():
    """A product as a convolution, a batched one as a dilated window, a kernel of ragged_dot."""
    assert compiled.flops(parse(TPU)) == DOT + BATCHED + RAGGED


def test_estimated_time():
    """Cycles of what is not inside a fusion, kernels at the peak, and nothing that is absurd."""
    assert compiled.seconds(parse(TPU), SPEED) == pytest.approx(3000 / 1e9 + RAGGED / 1e14)


SPARSE = """HloModule jit_step

%inner (a: bf16[4096,80], i: s32[512]) -> bf16[512,80] {
  %a = bf16[4096,80]{1,0} parameter(0)
  %i = s32[512]{0} parameter(1)
  ROOT %gather = bf16[512,80]{1,0} gather(%a, %i)
}

%called (a: bf16[4096,80], i: s32[512]) -> bf16[512,80] {
  %a = bf16[4096,80]{1,0} parameter(0)
  %i = s32[512]{0} parameter(1)
  ROOT %gather_offload_custom_fusion.1 = bf16[512,80]{1,0} fusion(%a, %i), kind=kCustom, \
calls=%inner, metadata={op_name="jit(step)/lookup/gather"}, \
backend_config={"estimated_cycles":"9223372036854775807"}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[4096,80], i: s32[512], u: f32[512,80], t: f32[4096,80]) -> f32[4096,80] {
  %a = bf16[4096,80]{1,0} parameter(0)
  %i = s32[512]{0} parameter(1)
  %u = f32[512,80]{1,0} parameter(2)
  %t = f32[4096,80]{1,0} parameter(3)
  %start = ((bf16[4096,80], s32[512]), bf16[512,80], u32[]) call-start(%a, %i), \
async_execution_thread="sparsecore", to_apply=%called
  %done = bf16[512,80]{1,0} call-done(%start)
  ROOT %scatter_offload_custom_fusion.2 = f32[4096,80]{1,0} fusion(%t, %i, %u), kind=kCustom, \
calls=%inner, metadata={op_name="jit(step)/row_update/scatter"}, \
backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_what_sparse_cores_do_takes_memory_s_time():
    """libtpu writes no cycles beside it, and it counted for nothing."""
    gathered, scattered = 2 * 512 * 80 * 2 + 512 * 4, 3 * 512 * 80 * 4 + 512 * 4
    parts = costs(parse(SPARSE), slice_of_links((1,)), SPEED)
    assert parts["lookup"]["SparseCores"] == pytest.approx(gathered / SPEED.bytes)
    assert parts["row_update"]["SparseCores"] == pytest.approx(scattered / SPEED.bytes)
    assert parts["lookup"]["seconds"] == parts["lookup"]["SparseCores"]
    assert compiled.seconds(parse(SPARSE), SPEED) == pytest.approx(
        (gathered + scattered) / SPEED.bytes)


SPLASH = """HloModule jit_step

ENTRY %main (n: s8[1,4,4], q: bf16[3,64,24], k: bf16[3,64,24], v: bf16[3,64,16]) -> bf16[3,64,24] {
  %n = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[3,64,24]{2,1,0} parameter(1)
  %k = bf16[3,64,24]{2,1,0} parameter(2)
  %v = bf16[3,64,16]{2,1,0} parameter(3)
  %l = f32[3,1,64]{2,1,0} broadcast(%v)
  %splash_mha_fwd_residuals.1 = bf16[3,64,16]{2,1,0} custom-call(%n, %n, %q, %k, %v), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 16
}}, metadata={op_name="jit(step)/attention/splash_mha_fwd_residuals/pallas_call"}
  %splash_mha_dkv_no_residuals.1 = (bf16[3,64,24], bf16[3,64,16]) custom-call(%n, %n, %q, %k, \
%v, %l), custom_call_target="tpu_custom_call"
  ROOT %splash_mha_dq_no_residuals.1 = bf16[3,64,24]{2,1,0} custom-call(%n, %n, %q, %k, %v, %l), \
custom_call_target="tpu_custom_call"
}
"""


def test_splash_attention():
    """Ten of sixteen blocks are visited, by two products forward and seven backward."""
    pairs, program = 3 * 10 * 16 * 16, parse(SPLASH)
    assert compiled.flops(program) == 2 * pairs * ((24 + 16) + (2 * 24 + 16) + 2 * (24 + 16))
    forward = costs(program, slice_of_links((1,)), SPEED)["attention"]
    assert forward["flops"] == 2 * pairs * (24 + 16)


def test_splash_attention_of_several_sequences():
    """The batch is an axis more of queries, keys and values."""
    batched = SPLASH.replace("[3,64,", "[2,3,64,").replace("{2,1,0}", "{3,2,1,0}")
    assert compiled.flops(parse(batched)) == 2 * compiled.flops(parse(SPLASH))
