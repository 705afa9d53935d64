"""Caches: a text read in pieces, and nothing left of who was there before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
from serving import CHUNK, END, ISOLATED, LENGTH, MODEL, PAD, SLOTS

from engram_jax.config import EngramConfig, OverEncodingConfig
from engram_jax.inference import caches, stages
from engram_jax.model import transformer
from engram_jax.model.attention import attention, attention_parameters, cached_attention, latents
from engram_jax.model.documents import documents
from engram_jax.model.engram import causal_conv, fuse, init_engram
from engram_jax.model.parameters import values
from engram_jax.settings import changed
from engram_jax.tables.layout import gather_rows

pytestmark = pytest.mark.usefixtures("compilations")
FIRST, SECOND, THIRD = (serving.prompt(length, seed=9) for length in (6, 5, 7))
SHARED = changed(MODEL, {
    "engram.one_table": True, "engram.per_branch": False, "engram.gated": False})
models = pytest.mark.parametrize("model", [MODEL, ISOLATED], ids=["together", "isolated"])


def empty(model):
    return caches.init_cache(model, SLOTS, LENGTH, PAD)


def read(model, text, slot=0, cache=None, before=()):
    """The cache after a text that goes on behind another, and the last logits."""
    cache = empty(model) if cache is None else jax.tree.map(jnp.array, cache)
    return serving.read(model, cache, text, slot, before)


def same(found, expected):
    """Two caches of equal bits."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def slot_of(cache, slot, upto=LENGTH):
    """All that a slot holds of its first positions."""
    keys = jax.tree.map(lambda leaf: leaf[:, slot, :upto], cache.keys)
    return keys, jax.tree.map(lambda leaf: leaf[slot], (cache.conv, cache.state))


# --- Split and whole ---


@pytest.mark.parametrize("model", [MODEL, ISOLATED, SHARED], ids=["together", "isolated", "shared"])
def test_pieces_are_the_whole(model):
    """Whatever the cuts, across the ends of documents, too: the logits of `transformer.apply`."""
    text = (*FIRST, END, *SECOND, END, END, *THIRD)
    whole = serving.whole_logits(model, text)
    for cuts in ((1, 7, 8), (6, 13), (2, 3, 14)):
        pieces = [text[start:stop] for start, stop in zip((0, *cuts), (*cuts, None), strict=True)]
        cache = empty(model)
        stop = 0
        for piece in pieces:
            cache, logits = read(model, piece, cache=cache, before=text[:stop])
            stop += len(piece)
            np.testing.assert_allclose(logits, whole[stop - 1], rtol=0, atol=5e-5)
        assert cache.state.length_B.tolist() == [len(text), 0, 0]
        assert cache.state.last_B.tolist() == [text[-1], PAD, PAD]


def test_a_chunk_of_nothing_leaves_nothing():
    cache, _ = read(MODEL, FIRST)
    context, state = stages.advance(
        cache.state, jnp.full((SLOTS, CHUNK), 9), np.zeros(SLOTS, np.int32), None)
    same(state, cache.state)
    assert context.positions_BT[:, 0].tolist() == [6, 0, 0]


def test_documents_begin_behind_the_end_token():
    state = empty(ISOLATED).state
    tokens = jnp.array([[9, END, 9, 9], [END, END, 9, 9], [9, 9, 9, END]])
    context, state = stages.advance(state, tokens, np.array([4, 3, 4], np.int32), END)
    assert context.first_BT.tolist() == [[0, 0, 2, 2], [0, 1, 2, 2], [0, 0, 0, 0]]
    assert state.first_B.tolist() == [2, 2, 0]
    assert state.length_B.tolist() == [4, 3, 4]
    context, state = stages.advance(state, tokens, np.array([1, 0, 2], np.int32), END)
    assert context.first_BT[:, 0].tolist() == [2, 2, 4]
    assert state.first_B.tolist() == [2, 2, 4]


# --- Slots ---


@models
def test_a_cleared_slot_knows_nothing(model):
    used, _ = read(model, (*FIRST, END, *SECOND))
    beside, _ = read(model, FIRST, slot=1, cache=used)
    cleared = caches.cleared(beside, 0, PAD)
    same(slot_of(cleared, 1), slot_of(beside, 1))
    found, logits = read(model, THIRD, cache=cleared)
    expected, wanted = read(model, THIRD)
    np.testing.assert_array_equal(logits, wanted)
    same(slot_of(found, 0, len(THIRD)), slot_of(expected, 0, len(THIRD)))


@models
def test_reading_touches_one_slot(model):
    other, _ = read(model, FIRST, slot=1)
    found, _ = read(model, THIRD, slot=0, cache=other)
    for slot in (1, 2):
        same(slot_of(found, slot), slot_of(other, slot))


# --- Attention and convolution ---


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


_attention = jax.jit(attention, static_argnames=("config", "eps"))
_latents = jax.jit(latents, static_argnames=("config", "eps"))
_cached_attention = jax.jit(cached_attention, static_argnames="config")
_fuse = jax.jit(fuse, static_argnames="config")


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("start", [0, 4])
def test_attention_to_the_cache_is_attention(start, isolated):
    """What lies behind a sequence's end in the cache is never looked at."""
    config, eps, time, room = MODEL.attention, 1e-6, 8, 12
    params = values(attention_parameters(jax.random.key(0), 32, config))
    x_BTD = random(2, time, 32)
    starts_BT = np.isin(np.arange(time), [3, 5])[None].repeat(2, axis=0) & isolated
    docs = documents(jnp.asarray(starts_BT))
    expected = _attention(
        params, x_BTD, config, eps, docs.number_BT if isolated else None)
    positions_BT = jnp.arange(time)[None].repeat(2, axis=0)
    kept = [1e3 * random(2, room, size, seed=5) for size in (config.kv_rank, config.rope_dim)]
    kept = [cache.at[:, :time].set(new) for cache, new in zip(
        kept, _latents(params, x_BTD, positions_BT, config, eps), strict=True)]
    first_BT = positions_BT - docs.position_BT
    found = _cached_attention(params, x_BTD[:, start:], *kept, positions_BT[:, start:],
                              first_BT[:, start:], config=config)
    np.testing.assert_allclose(found, expected[:, start:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("cut", [1, 5, 9, 11])
def test_convolution_with_what_came_before_is_the_whole(cut, isolated):
    x_BTMD, taps_LMD = random(2, 12, 3, 4), random(4, 3, 4, seed=1)
    position_BT = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7], range(12)])
    position_BT = position_BT if isolated else None
    whole = causal_conv(x_BTMD, taps_LMD, 3, position_BT)
    before = jnp.pad(x_BTMD[:, :cut], ((0, 0), (9, 0), (0, 0), (0, 0)))[:, -9:]
    found = causal_conv(x_BTMD[:, cut:], taps_LMD, 3,
                        None if position_BT is None else position_BT[:, cut:], before)
    np.testing.assert_array_equal(found, whole[:, cut:])
    if not isolated:
        x = np.asarray(x_BTMD)
        by_hand = sum(taps_LMD[3 - back] * x[1, 11 - 3 * back] for back in range(4))
        np.testing.assert_allclose(whole[1, 11], by_hand, rtol=1e-5)


def test_fusion_in_pieces_is_the_whole():
    config = EngramConfig(layers=(0,), rows_per_head=(64, 128), heads=2, head_dim=8, shards=4)
    params = init_engram(jax.random.key(0), 16, 2, config)
    params["conv"] = random(*params["conv"].shape)
    hidden, rows = random(1, 20, 2, 16), random(1, 20, 4, 8, seed=1)
    whole = _fuse(params, hidden, rows, config)
    kept = jnp.zeros((1, config.conv_reach, 2, 16))
    pieces = []
    for start in range(0, 20, 5):
        part = slice(start, start + 5)
        fused = _fuse(params, hidden[:, part], rows[:, part], config, before_BPMD=kept)
        kept = jnp.concatenate([kept, fused.taps_BTMD], axis=1)[:, -config.conv_reach:]
        pieces.append(fused.delta_BTMD)
    np.testing.assert_allclose(
        jnp.concatenate(pieces, axis=1), whole.delta_BTMD, rtol=0, atol=1e-6)


# --- What is kept of the parameters ---


def test_parameters_in_the_compute_dtype_give_the_same_bits():
    over = OverEncodingConfig(rows_per_head=(64, 128), heads=2, shards=4)
    model = dataclasses.replace(
        MODEL, compute_dtype="bfloat16", over_encoding=over, depth=1,
        engram=dataclasses.replace(MODEL.engram, layers=(0,)),
        moe=dataclasses.replace(MODEL.moe, dense_layers=0))
    params, bias, tables, addressing = serving.parts(model)
    kept = stages.serving_params(params, model)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, kept)]
    assert sizes[1] < 0.6 * sizes[0]
    tokens_BT = np.array([serving.prompt(16)], np.int32)
    rows = gather_rows(model, tables, addressing.ids(tokens_BT))
    logits = jax.jit(functools.partial(
        transformer.apply, rows=rows, router_bias=bias, config=model, tokens_BT=tokens_BT))
    np.testing.assert_array_equal(logits(kept)[0], logits(params)[0])
