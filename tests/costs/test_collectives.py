"""Collectives are found, sized and counted in what XLA compiles for CPUs, and in TPU samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from engram_jax.costs.collectives import by_kind, collectives
from engram_jax.costs.hlo import bytes_of, parse, shapes

LAYERS, WIDTH = 6, 64


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))


def compiled(mesh, function, specs, out, *arrays):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(*arrays).compile()


def test_one_of_each_kind(mesh):
    both = ("data", "fsdp")

    def say(x_8):
        summed = jax.lax.psum(x_8, both)
        gathered = jax.lax.all_gather(x_8, "fsdp", tiled=True)
        scattered = jax.lax.psum_scatter(gathered, "fsdp", tiled=True)
        sent = jax.lax.all_to_all(x_8, both, 0, 0, tiled=True)
        passed = jax.lax.ppermute(x_8, "data", [(0, 1), (1, 0)])
        return summed + scattered + sent + passed

    found = collectives(compiled(mesh, say, P(both), P(both), np.ones(64, np.float32)))
    assert by_kind(found) == {
        "all-gather": {"count": 1, "bytes": 32, "largest_bytes": 32},
        "all-reduce": {"count": 1, "bytes": 32, "largest_bytes": 32},
        "reduce-scatter": {"count": 1, "bytes": 128, "largest_bytes": 128},
        "all-to-all": {"count": 1, "bytes": 32, "largest_bytes": 32},
        "collective-permute": {"count": 1, "bytes": 32, "largest_bytes": 32}}
    rows, whole = ((0, 1, 2, 3), (4, 5, 6, 7)), (tuple(range(8)),)
    assert {one.kind: one.groups for one in found} == {
        "all-gather": rows, "all-reduce": whole, "reduce-scatter": rows, "all-to-all": whole,
        "collective-permute": tuple((one, (one + 4) % 8) for one in (0, 4, 1, 5, 2, 6, 3, 7))}
    assert all(one.exact and one.times == 1 and one.source for one in found)


def test_a_scan_multiplies(mesh):
    """Weights gathered block by block, and their gradients scattered block by block."""

    def loss(weight_LDD, x_BD):
        def block(x_BD, weight_DD):
            whole_DD = jax.lax.all_gather(weight_DD, "fsdp", tiled=True)
            return jnp.tanh(x_BD @ whole_DD), None
        return jnp.sum(jax.lax.scan(jax.checkpoint(block), x_BD, weight_LDD)[0])

    program = compiled(
        mesh, jax.grad(loss), (P(None, "fsdp"), P(("data", "fsdp"))), P(None, "fsdp"),
        np.ones((LAYERS, WIDTH, WIDTH), np.float32), np.ones((16, WIDTH), np.float32))
    found = collectives(program)
    shard, whole = WIDTH * WIDTH // 4 * 4, WIDTH * WIDTH * 4
    assert by_kind(found) == {
        "all-gather": {"count": 2 * LAYERS, "bytes": 2 * LAYERS * shard, "largest_bytes": shard},
        "reduce-scatter": {"count": LAYERS, "bytes": LAYERS * whole, "largest_bytes": whole}}
    assert {one.shapes for one in found if one.kind == "reduce-scatter"} == {
        (("f32", (WIDTH, WIDTH)),)}


def test_a_loop_of_unknown_length_counts_once(mesh):
    def rounds(x_8):
        def more(carry):
            number, x_8 = carry
            return number + 1, jax.lax.all_to_all(x_8, ("data", "fsdp"), 0, 0, tiled=True)

        stop = jax.lax.pmax(jnp.max(x_8), ("data", "fsdp"))
        return jax.lax.while_loop(lambda carry: carry[0] < stop, more, (0.0, x_8))[1]

    both = P(("data", "fsdp"))
    found = collectives(compiled(mesh, rounds, both, both, np.ones(64, np.float32)))
    assert [(one.kind, one.times, one.exact) for one in found if one.kind == "all-to-all"] == [
        ("all-to-all", 1, False)]
    assert [one.exact for one in found if one.kind == "all-reduce"] == [True]


def test_a_program_that_keeps_to_itself():
    program = jax.jit(lambda x: jnp.sort(x) + 1).lower(np.ones(8, np.float32)).compile()
    assert collectives(program) == []


TPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

%all-reduce-scatter (p: bf16[1024,256]) -> bf16[64,256] {
  %p = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce = bf16[1024,256]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=3, \
replica_groups=[2,16]<=[32], use_global_device_ids=true, to_apply=%sum
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[64,256]{1,0} dynamic-slice(%all-reduce, %zero, %zero), \
dynamic_slice_sizes={64,256}
}

%async_computation (q: bf16[32,8,80]) -> bf16[32,8,80] {
  %q = bf16[32,8,80]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inner = bf16[32,8,80]{2,1,0:T(8,128)(2,1)} all-to-all(%q), channel_id=5, \
replica_groups=[1,32]<=[32], dimensions={0}
}

%condition (c: (s32[], bf16[1024,256])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(13)
  %number = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%number, %bound), direction=LT
}

%body (c.1: (s32[], bf16[1024,256])) -> (s32[], bf16[1024,256]) {
  %c.1 = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %weight = bf16[1024,256]{1,0:T(8,128)(2,1)} get-tuple-element(%c.1), index=1
  %scattered = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} fusion(%weight), kind=kCustom, \
calls=%all-reduce-scatter, metadata={op_name="jit(step)/reduce_scatter"}
  %started = (bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[1024,256]{1,0:T(8,128)(2,1)}, \
/*index=2*/u32[]{:S(2)}) all-gather-start(%scattered), channel_id=4, \
replica_groups=[2,16]<=[32], dimensions={0}
  %done = bf16[1024,256]{1,0:T(8,128)(2,1)} all-gather-done(%started)
  %number.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %next = (s32[], bf16[1024,256]) tuple(%number.1, %done)
}

ENTRY %main (weight.1: bf16[1024,256], rows: bf16[32,8,80]) -> bf16[32,8,80] {
  %weight.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(0)
  %rows = bf16[32,8,80]{2,1,0:T(8,128)(2,1)} parameter(1)
  %three = s32[]{:T(128)} constant(3)
  %copied = s32[]{:T(128)} copy(%three)
  %carry = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) tuple(%copied, %weight.1)
  %loop = (s32[]{:T(128)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) while(%carry), \
condition=%condition, body=%body
  %async-start = ((bf16[32,8,80]{2,1,0}), bf16[32,8,80]{2,1,0}, u32[]{:S(2)}) \
async-start(%rows), calls=%async_computation
  ROOT %async-done = bf16[32,8,80]{2,1,0} async-done(%async-start)
}
"""


def test_the_forms_of_tpus():
    """A loop without its trip count, a fused reduce-scatter, asynchronous starts, iota groups."""
    found = {one.kind: one for one in collectives(TPU)}
    assert by_kind(found.values()) == {
        "all-gather": {"count": 10, "bytes": 10 * 64 * 256 * 2, "largest_bytes": 64 * 256 * 2},
        "reduce-scatter": {"count": 10, "bytes": 10 * 1024 * 256 * 2,
                           "largest_bytes": 1024 * 256 * 2},
        "all-to-all": {"count": 1, "bytes": 32 * 8 * 80 * 2, "largest_bytes": 32 * 8 * 80 * 2}}
    assert len(found["all-gather"].groups[0]) == 16
    assert len(found["reduce-scatter"].groups[0]) == 16
    assert len(found["all-to-all"].groups[0]) == 32
    assert found["reduce-scatter"].source == "jit(step)/reduce_scatter"


def test_sugared_asynchronous_all_to_all_counts_once():
    text = TPU.replace("async-start(%rows)", "all-to-all-start(%rows)").replace(
        "async-done(", "all-to-all-done(")
    assert by_kind(collectives(text))["all-to-all"]["count"] == 1


def test_a_condition_on_data_has_no_trip_count():
    text = TPU.replace("constant(13)", "get-tuple-element(%c), index=0")
    assert [one.exact for one in collectives(text)].count(False) == 2


@pytest.mark.parametrize(("text", "expected", "size"), [
    ("f32[8,16]{1,0:T(8,128)S(1)}", [("f32", (8, 16))], 512),
    ("(f32[], /*index=1*/bf16[3,<=5]{1,0}, u32[]{:S(2)})",
     [("f32", ()), ("bf16", (3, 5)), ("u32", ())], 4 + 30 + 4),
    ("f8e4m3fn[80]{0}", [("f8e4m3fn", (80,))], 80),
    ("s4[7]{0:E(4)}", [("s4", (7,))], 4),
    ("pred[9]{0}", [("pred", (9,))], 9),
    ("()", [], 0),
])
def test_shapes(text, expected, size):
    assert list(shapes(text)) == expected
    assert sum(map(bytes_of, shapes(text))) == size


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule empty\n")


CUT = """HloModule jit_step

%start (a: bf16[16,8]) -> (bf16[16,8], bf16[256,8]) {
  %a = bf16[16,8]{1,0} parameter(0)
  %all-gather.1 = bf16[256,8]{1,0} all-gather(%a), channel_id=7, replica_groups=[16,16]<=[256], \
dimensions={0}, metadata={op_name="jit(step)/gather_weights/all_gather"}
  ROOT %custom-call.1 = (bf16[16,8]{1,0}, bf16[256,8]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%between (b: bf16[16,8], x: bf16[8,8]) -> bf16[8,8] {
  %b = bf16[16,8]{1,0} parameter(0)
  %x = bf16[8,8]{1,0} parameter(1)
  %all-gather.2 = bf16[256,8]{1,0} all-gather(%b), channel_id=7, replica_groups=[16,16]<=[256], \
dimensions={0}
  ROOT %dot.1 = bf16[8,8]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
}

%done (c: bf16[16,8]) -> bf16[256,8] {
  %c = bf16[16,8]{1,0} parameter(0)
  %all-gather.3 = bf16[256,8]{1,0} all-gather(%c), channel_id=7, replica_groups=[16,16]<=[256], \
dimensions={0}
  ROOT %custom-call.2 = bf16[256,8]{1,0} custom-call(%c, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[16,8], x: bf16[8,8]) -> bf16[256,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %x = bf16[8,8]{1,0} parameter(1)
  %f.1 = (bf16[16,8]{1,0}, bf16[256,8]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %f.2 = bf16[8,8]{1,0} fusion(%p, %x), kind=kOutput, calls=%between
  %alone = bf16[256,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[16,16]<=[256], \
dimensions={0}
  ROOT %f.3 = bf16[256,8]{1,0} fusion(%p), kind=kCustom, calls=%done
}
"""


FUSED = """\
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%scattered (x: f32[64,8], all: f32[4,8,8]) -> f32[4,8,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %all = f32[4,8,8]{2,1,0} parameter(1)
  %part = f32[8,8]{1,0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={0}, to_apply=%sum
  %one = f32[1,8,8]{2,1,0} bitcast(%part)
  %zero = s32[] constant(0)
  ROOT %kept = f32[4,8,8]{2,1,0} dynamic-update-slice(%all, %one, %zero, %zero, %zero)
}

ENTRY %main (x.1: f32[64,8], all.1: f32[4,8,8]) -> f32[4,8,8] {
  %x.1 = f32[64,8]{1,0} parameter(0)
  %all.1 = f32[4,8,8]{2,1,0} parameter(1)
  ROOT %f = f32[4,8,8]{2,1,0} fusion(%x.1, %all.1), kind=kCustom, calls=%scattered
}
"""


def test_one_that_a_gpu_has_fused_with_a_slice_counts():
    """As XLA's `dynamic-slice` fusions do; nothing is cut there."""
    [one] = collectives(FUSED)
    assert (one.kind, one.bytes, one.times, one.groups) == (
        "reduce-scatter", 2048, 1, (tuple(range(8)),))


def test_one_that_a_tpu_cuts_into_fusions_counts_once_and_overlaps():
    """What stands alone counts, though it may have the channel of one that is cut."""
    calls = collectives(CUT)
    assert [(one.kind, one.bytes, one.times, one.overlaps) for one in calls] == [
        ("all-gather", 256, 1, True), ("all-gather", 256, 1, False)]
    assert "gather_weights" in calls[0].source
