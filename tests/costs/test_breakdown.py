"""Scopes are found in compiled programs, and what each takes."""

import ast
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from links import slice_of_links

import engram_jax
from engram_jax.costs.breakdown import (
    OTHER,
    SCOPES,
    by_kind,
    by_scope,
    costs,
    multiplied,
    roofline,
    scope_of,
    total,
)
from engram_jax.costs.compiled import Speed
from engram_jax.costs.hlo import parse

TORUS = slice_of_links((4, 4))
SPEED = Speed(cycles=1e9, flops=1e12, bytes=1e12)


def scopes_of_the_code():
    """The names that the package gives with `jax.named_scope`."""
    for path in Path(engram_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.named_scope":
                yield ast.literal_eval(node.args[0])


def test_every_scope_of_the_code_is_known_here_and_no_other():
    assert set(scopes_of_the_code()) == set(SCOPES)


@pytest.mark.parametrize(("name", "scope"), [
    ("jit(step)/jit(main)/attention/dot_general", "attention"),
    ("jit(step)/transpose(jvp(experts))/mul", "experts"),
    ("jit(step)/attention/rms_norm/mul", "rms_norm"),
    ("jit(step)/fusion/gate/rms_norm/mul", "gate"),
    ("jit(step)/fusion/gather_weights/all_gather", "fusion"),
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
    parts = costs(program, TORUS, SPEED)
    assert parts["attention"]["flops"] == 2 * (2 * 4 * 16 * 8)  # forward, the weight's gradient
    assert parts["head"]["flops"] >= 2 * 4 * 8 * 32


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
    costs_of = costs(parse(TPU), TORUS, SPEED)
    parts = by_scope(costs_of)
    assert {name: round(part["seconds"] * 1e9) for name, part in parts.items()} == {
        "attention": 430, "experts": 200, OTHER: 70}
    assert list(parts) == ["attention", "experts", OTHER]
    assert parts["experts"]["kernels"] == parts["experts"]["seconds"]
    assert "copies" not in parts["experts"]
    assert {name: round(seconds * 1e9) for name, seconds in by_kind(costs_of).items()} == {
        "matrix products": 400, "kernels": 200, "copies": 30, "SparseCores": 0,
        "memory-bound": 70}


def test_a_collective_is_its_scopes():
    gather = ("%g = f32[32,8]{1,0} all-gather(%k), replica_groups=[4,4]<=[16], dimensions={0}, "
              'metadata={op_name="jit(step)/gather_weights/all_gather"}')
    text = TPU.replace("ROOT %s =", f"{gather}\n  ROOT %s =")
    part = costs(parse(text), TORUS, SPEED)["gather_weights"]
    shown = by_scope(costs(parse(text), TORUS, SPEED))["gather_weights"]
    assert shown == {"seconds": 0, "flops": 0, "sent_bytes": 256, "collective_s": 384,
                     "bytes all-gather": 256}
    assert part["sent_bytes"] == part["bytes all-gather"] == 8 * 8 * 4
    assert part["count all-gather"] == 1
    assert part["collective_s"] == pytest.approx(256 * 3 / 2)
    assert part["overlapping_s"] == 0


def test_what_runs_only_where_a_capacity_is_short_is_not_counted():
    def step(weights, x, rounds):
        with jax.named_scope("experts"):
            x = x @ weights
            more = jax.lax.while_loop(
                lambda carry: carry[0] < rounds,
                lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ weights)), (1, x))
            return jax.lax.scan(lambda x, _: (x @ weights, None), more[1], length=3)[0]

    matrix = np.ones((8, 8), np.float32)
    program = parse(jax.jit(step).lower(matrix, matrix, 1).compile().as_text())
    assert costs(program, TORUS, SPEED)["experts"]["flops"] == 4 * 2 * 8**3


def test_what_is_missing_is_multiplied_out():
    few = {"ffn": Counter(seconds=3.0, flops=10), "fusion": Counter(seconds=1.0),
           "lookup": Counter(seconds=2.0), "head": Counter(seconds=5.0)}
    more = {**few, "ffn": Counter(seconds=5.0, flops=20), "router": Counter(seconds=0.5)}
    whole = multiplied(few, more, blocks=2.5, tables=2, fusions=3)
    assert {name: part["seconds"] for name, part in whole.items()} == {
        "ffn": 8.0, "fusion": 3.0, "lookup": 4.0, "head": 5.0, "router": 1.25}
    assert total(whole, "flops") == 35


def test_what_overlaps_hides_behind_computing():
    parts = {"ffn": Counter(seconds=10.0, collective_s=9.0, overlapping_s=6.0)}
    times = roofline(parts, model_flops=26.0, peak_flops=5.0)
    assert (times.collective_s, times.overlapping_s, times.step_s) == (9, 6, 13)
    assert times.mfu == pytest.approx(0.4)
    parts["ffn"]["seconds"] = 1.0
    assert roofline(parts, 1.0, 1.0).step_s == 9
