"""Scopes are found in compiled programs; the wire's time is that of a torus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.costs.breakdown import OTHER, Torus, by_kind, by_scope, roofline, scope_of
from engram_jax.costs.collectives import Collective
from engram_jax.costs.hlo import parse


def one(kind, size, group=0, **fields):
    return Collective(kind=kind, shapes=(), bytes=size, times=1, exact=True, group=group,
                      source="", **fields)


@pytest.mark.parametrize(("name", "scope"), [
    ("jit(step)/jit(main)/attention/dot_general", "attention"),
    ("jit(step)/transpose(jvp(experts))/mul", "experts"),
    ("jit(step)/attention/norm/mul", "norm"),
    ("jit(step)/attentions/mul", OTHER),
    ("", OTHER),
])
def test_the_innermost_scope_counts(name, scope):
    assert scope_of(name) == scope


def test_products_of_a_program_go_to_their_scopes_gradients_too():
    def loss(weights, x):
        with jax.named_scope("attention"):
            x = jnp.tanh(x @ weights[0])
        with jax.named_scope("head"):
            return jnp.sum(x @ weights[1])

    shapes = [np.ones((16, 8), np.float32), np.ones((8, 32), np.float32)]
    program = parse(jax.jit(jax.grad(loss)).lower(
        shapes, np.ones((4, 16), np.float32)).compile().as_text())
    parts = by_scope(program, [one("all-gather", 100)], 1e9, 1e12)
    assert parts["attention"].flops == 2 * (2 * 4 * 16 * 8)  # forward, and the weight's gradient
    assert parts["head"].flops >= 2 * 4 * 8 * 32
    assert parts[OTHER].sent_bytes == 100


TPU = """HloModule jit_step

%product (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%sum (b: f32[8,8]) -> f32[8,8] {
  %b = f32[8,8]{1,0} parameter(0)
  ROOT %add.1 = f32[8,8]{1,0} add(%b, %b)
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %f = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product, \
metadata={op_name="jit(step)/attention/dot_general"}, backend_config={"estimated_cycles":"400"}
  %c = f32[8,8]{0,1} copy(%f), metadata={op_name="jit(step)/attention/transpose"}, \
backend_config={"estimated_cycles":"30"}
  %k = f32[8,8]{1,0} custom-call(%c), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/experts/ragged"}, backend_config={"estimated_cycles":"200"}
  ROOT %s = f32[8,8]{1,0} fusion(%k), kind=kLoop, calls=%sum, \
metadata={op_name="jit(step)/add"}, backend_config={"estimated_cycles":"70"}
}
"""


def test_time_by_scope_and_by_kind():
    program = parse(TPU)
    parts = by_scope(program, [], 1e9, 1e12)
    assert {name: round(part.seconds * 1e9) for name, part in parts.items()} == {
        "attention": 430, "experts": 200, OTHER: 70}
    assert list(parts) == ["attention", "experts", OTHER]
    kinds = by_kind(program, 1e9, 1e12)
    assert {name: round(seconds * 1e9) for name, seconds in kinds.items()} == {
        "matrix products": 400, "kernels": 200, "copies": 30, "memory-bound": 70}


def test_the_wire_of_a_ring_of_sixteen():
    """Links of 1 byte a second, two ways: 2 bytes a second on one axis, 4 on both."""
    torus = Torus(sizes=(16, 16), link=1.0)
    assert torus.seconds(one("all-gather", 10, 16)) == pytest.approx(10 * 15 / 2)
    assert torus.seconds(one("reduce-scatter", 160, 16)) == pytest.approx(160 * 15 / 16 / 2)
    assert torus.seconds(one("all-reduce", 160, 16)) == pytest.approx(160 * 15 / 16)
    assert torus.seconds(one("all-gather", 10)) == pytest.approx(10 * 255 / 4)
    assert torus.seconds(one("all-to-all", 160, 16)) == pytest.approx(160 * 15 / 16 * 4 / 2)
    assert torus.seconds(one("all-to-all", 256)) == pytest.approx(256 * 255 / 256 * 4 / 2)
    assert torus.seconds(one("collective-permute", 7, 16)) == 7
    assert torus.seconds(one("all-gather", 10, 1)) == 0


def test_what_overlaps_hides_behind_computing():
    torus = Torus(sizes=(4, 4), link=1.0)
    shown = one("all-gather", 2, 4)  # 3 s
    hidden = one("all-gather", 4, 4, overlaps=True)  # 6 s
    times = roofline(10.0, [shown, hidden], torus, model_flops=26.0, peak_flops=5.0)
    assert (times.collective_s, times.overlapping_s, times.step_s) == (9, 6, 13)
    assert times.mfu == pytest.approx(0.4)
    assert roofline(1.0, [shown, hidden], torus, 1.0, 1.0).step_s == 9
