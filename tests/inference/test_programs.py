"""What a decode step asks of a GPU, as far as it can be read off what is given to the compiler.

What the compiler for an H200 made of it before, `experiments/accelerators/README.md` says.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
from serving import LENGTH, PAD, SLOTS

from engram_jax.inference import caches, stages
from engram_jax.inference.sampling import Sampling
from engram_jax.model.layers import ffn
from engram_jax.settings import changed

MODEL = changed(serving.FIRST, {"depth": 2})
TEXT = functools.partial(jnp.zeros, dtype=jnp.int32)


@functools.cache
def traced(tokens):
    """The stage that reads so many tokens: one of all slots, or more of one slot."""
    params, bias, _, _ = serving.parts(MODEL)
    batch, slot = (SLOTS, None) if tokens == 1 else (1, TEXT(()))
    stage = stages.stages(MODEL)[1]
    cache, site = caches.init_cache(MODEL, SLOTS, LENGTH, PAD), MODEL.engram
    context = stages.Context(TEXT((batch, tokens)), TEXT((batch, tokens)), TEXT(batch))
    return stages.proceed.trace(
        params["segments"], bias, cache.keys, cache.conv[stage.layer],
        jnp.zeros((batch, tokens, MODEL.streams, MODEL.width), MODEL.compute_dtype),
        jnp.zeros((batch, tokens, site.total_heads, site.head_dim)), context, slot,
        model=MODEL, start=stage.start)


def lowered(trace, platform):
    return trace.lower(lowering_platforms=(platform,)).as_text()


def finished(greedy):
    sampling = Sampling(jnp.zeros(SLOTS), TEXT(SLOTS), jnp.ones(SLOTS),
                        jnp.zeros(SLOTS, jnp.uint32))
    params = serving.parts(MODEL).params
    context = stages.Context(TEXT((SLOTS, 1)), TEXT((SLOTS, 1)), TEXT(SLOTS))
    return lowered(stages.finish.trace(
        params, jnp.zeros((SLOTS, 1, MODEL.streams, MODEL.width)), context, sampling, TEXT(SLOTS),
        None, model=MODEL, known=serving.VOCAB, greedy=greedy), "cuda")


@pytest.mark.parametrize("tokens", [1, 4])
def test_keys_are_written_where_nothing_has_to_be_sorted(tokens):
    """A GPU that keeps the order of sums sorts what is written to places that may be the same."""
    text = lowered(traced(tokens), "cuda")
    assert text.count("unique_indices = true") == len(caches.Keys._fields)
    assert "unique_indices = false" not in text


def test_no_two_tokens_are_written_to_one_place():
    """Dropped ones neither, whose places are behind all others."""
    positions = jnp.arange(4, dtype=jnp.int32)[None] + jnp.array([[0], [LENGTH - 4], [5]])
    count = jnp.array([4, 1, 0])
    places = np.asarray(stages._places(stages.Context(positions, positions, count), LENGTH))
    for row, (kept, own) in enumerate(zip(count, places, strict=True)):
        np.testing.assert_array_equal(own[:kept], positions[row, :kept])
        assert (own[kept:] >= LENGTH).all()
        assert len(set(own.tolist())) == len(own)


def test_blocks_are_counted_and_not_scanned():
    """What is read by the loop's own counter is read where it is."""
    loops = [equation for equation in traced(1).jaxpr.eqns if equation.primitive.name == "scan"]
    assert loops
    for loop in loops:
        whole = [variable.aval.shape for variable in loop.invars]
        assert [inner.shape for inner in loop.params["jaxpr"].in_avals] == whole


def test_products_of_one_input_are_apart_where_tokens_are_few():
    """On GPUs; one in attention and one in the FFN."""
    trace = traced(1)
    assert lowered(trace, "cuda").count("optimization_barrier") == 2
    assert "optimization_barrier" not in lowered(trace, "cpu")


def test_products_of_one_input_stay_together_where_tokens_are_many():
    width = 4
    params = {name: jnp.zeros((width, width)) for name in ("gate", "up", "down")}
    few, many = (lowered(jax.jit(ffn).trace(params, jnp.zeros((1, time, width))), "cuda")
                 for time in (width - 1, width))
    assert "optimization_barrier" in few
    assert "optimization_barrier" not in many


def test_drawing_asks_the_host_for_nothing():
    """A branch would wait for the device; the likeliest tokens need no sorting."""
    for greedy in (True, False):
        text = finished(greedy)
        assert "stablehlo.case" not in text
        assert "stablehlo.if" not in text
        assert ("stablehlo.sort" in text) != greedy
