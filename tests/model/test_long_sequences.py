"""Attention and loss in chunks are attention and loss in one piece, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import AttentionConfig, ModelConfig
from engram_jax.model import attention_kernels, transformer
from engram_jax.model import loss as loss_module
from engram_jax.model.attention import attention, attention_parameters
from engram_jax.model.loss import cross_entropy, mean_token_loss, token_losses
from engram_jax.model.parameters import values

pytestmark = pytest.mark.usefixtures("compilations")

CONFIG = AttentionConfig(heads=2, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8)
MODEL = ModelConfig(vocab_size=50, width=16, depth=1, ffn=16, attention=CONFIG, streams=2,
                    compute_dtype="float32")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, theirs)


def attended(documents_BT, time):
    """The output and every gradient of attention over random input."""
    params = values(attention_parameters(jax.random.key(0), 16, CONFIG))

    def output(params, x_BTD):
        out_BTD = attention(params, x_BTD, CONFIG, 1e-6, documents_BT)
        return jnp.sum(out_BTD * random(*out_BTD.shape, seed=1)), out_BTD

    return jax.jit(jax.grad(output, argnums=(0, 1), has_aux=True))(params, random(2, time, 16))


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("keys", [4096, 12])
@pytest.mark.parametrize("time", [13, 16])
def test_attention_in_chunks(monkeypatch, isolated, keys, time):
    """In chunks of 5, or beyond 12 keys in a loop of chunks of 4 and 3."""
    documents_BT = np.cumsum(random(2, time, seed=2) > 0.8, axis=1) if isolated else None
    whole = attended(documents_BT, time)
    monkeypatch.setattr(attention_kernels, "QUERY_CHUNK", 5)
    monkeypatch.setattr(attention_kernels, "KEYS", keys)
    same(attended(documents_BT, time), whole)


def test_chunks_compute_no_score_of_the_future(monkeypatch):
    monkeypatch.setattr(attention_kernels, "QUERY_CHUNK", 4)
    params = values(attention_parameters(jax.random.key(0), 16, CONFIG))
    traced = jax.make_jaxpr(lambda x: attention(params, x, CONFIG, 1e-6))(random(1, 12, 16))
    for stop in (4, 8, 12):
        assert f"f32[1,2,4,{stop}]" in str(traced)
    assert "f32[1,2,12,12]" not in str(traced)


@functools.cache
def network(tied):
    config = dataclasses.replace(MODEL, tied_head=tied)
    return config, transformer.init(config, jax.random.key(0))


def lost(config, params, x_BTMD, targets_BT):
    """Every token's loss, and the gradients of their weighted sum."""

    def total(params, x_BTMD):
        loss_BT = token_losses(params, x_BTMD, targets_BT, config)
        return jnp.sum(loss_BT * random(*loss_BT.shape, seed=3)), loss_BT

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x_BTMD)


def mean_lost(config, params, x_BTMD, targets_BT):
    """Three times the mean loss, and its gradients."""

    def total(params, x_BTMD):
        return 3 * mean_token_loss(params, x_BTMD, targets_BT, config)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, x_BTMD)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [4, 7])
def test_the_mean_in_chunks_makes_its_logits_once(monkeypatch, tokens, tied):
    """Four do not divide the 21 tokens, so the last chunk is filled up with some that count not."""
    config, params = network(tied)
    x_BTMD, targets_BT = random(3, 7, 2, 16), np.arange(21).reshape(3, 7)
    whole = mean_lost(config, params, x_BTMD, targets_BT)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", tokens * config.vocab_size)
    same(mean_lost(config, params, x_BTMD, targets_BT), whole)
    traced = str(jax.make_jaxpr(jax.grad(
        lambda params, x: mean_token_loss(params, x, targets_BT, config), argnums=(0, 1)))(
            params, x_BTMD))
    assert traced.count("scan[") == 1, "the backward pass goes over no chunk"


@pytest.mark.parametrize(("size", "tokens"), [(64, 2), (128, 4), (256, 8), (512, 8)])
def test_the_mean_of_many_tokens_has_larger_chunks(monkeypatch, size, tokens):
    config, params = network(False)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 2 * config.vocab_size)
    traced = str(jax.make_jaxpr(lambda *args: mean_token_loss(*args, config))(
        params, random(1, size, 2, 16), np.zeros((1, size), np.int32)))
    assert f"length={size // tokens} " in traced.replace("\n", " ")


def test_the_gradient_of_the_mean_adds_up_in_float32(monkeypatch):
    """In bfloat16 the sum of 4,096 equal parts would end at 256 of them."""
    config = dataclasses.replace(network(False)[0], compute_dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), network(False)[1])
    x_BTMD, targets_BT = jnp.ones((1, 4096, 2, 16), jnp.bfloat16), np.zeros((1, 4096), np.int32)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", config.vocab_size)
    many = mean_lost(config, params, x_BTMD, targets_BT)[1][0]["head"]
    one = mean_lost(config, params, x_BTMD[:, :1], targets_BT[:, :1])[1][0]["head"]
    np.testing.assert_allclose(many.astype(np.float32), one.astype(np.float32), rtol=0.02)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 7, 21])
def test_loss_in_chunks(monkeypatch, tokens, tied):
    config, params = network(tied)
    x_BTMD, targets_BT = random(3, 7, 2, 16), np.arange(21).reshape(3, 7)
    whole = lost(config, params, x_BTMD, targets_BT)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", tokens * config.vocab_size)
    same(lost(config, params, x_BTMD, targets_BT), whole)


def test_few_logits_are_made_at_once_and_many_in_chunks(monkeypatch):
    config, params = network(False)
    x_BTMD, targets_BT = random(2, 8, 2, 16), np.zeros((2, 8), np.int32)
    whole = cross_entropy(transformer.head(params, x_BTMD, config), targets_BT)
    np.testing.assert_array_equal(token_losses(params, x_BTMD, targets_BT, config), whole)
    trace = jax.make_jaxpr(token_losses, static_argnums=3)
    assert "[2,8,50]" in str(trace(params, x_BTMD, targets_BT, config))
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 4 * config.vocab_size)
    trace = jax.make_jaxpr(lambda *args: token_losses(*args, config))
    assert "[2,8,50]" not in str(trace(params, x_BTMD, targets_BT))


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    logits_BTV = random(2, 3, 50) * 5
    targets_BT = np.arange(6).reshape(2, 3)
    expected = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits_BTV)), targets_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(cross_entropy(logits_BTV, targets_BT), expected, rtol=1e-5)
