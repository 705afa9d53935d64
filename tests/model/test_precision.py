"""What a CPU in float32 does not show: sums that stay in float32 where bfloat16 goes in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig
from engram_jax.hashing.addressing import sites
from engram_jax.model import layers, loss, moe, transformer
from engram_jax.model.hyper_connections import connect, joined, laid_out, mixing_parameters
from engram_jax.model.parameters import values
from engram_jax.training import fsdp, placement

pytestmark = pytest.mark.usefixtures("compilations")

VOCAB, WIDTH, TIME = 64, 16, 1024
MODEL = ModelConfig(
    vocab_size=VOCAB, width=WIDTH, depth=1, ffn=16, compute_dtype="bfloat16", remat="none",
    attention=AttentionConfig(heads=1, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def embedding_gradient(tokens_BT, cotangents_BTD, devices):
    """That of sum(embedded * cotangents), as the training step makes it."""
    mesh = placement.make_mesh(1, devices)
    split = fsdp.split(transformer.declared(MODEL), devices, MODEL.compute_dtype)
    specs = PartitionSpec("fsdp"), PartitionSpec("fsdp"), PartitionSpec("fsdp")

    def local(table_VD, tokens_BT, cotangents_BTD):
        def loss(table_VD):
            x_BTMD = transformer.embed({"embedding": table_VD}, tokens_BT, {}, MODEL, split.whole)
            return jnp.sum(x_BTMD[:, :, 0].astype(jnp.float32) * cotangents_BTD)

        grad = jax.grad(loss)(table_VD)
        return grad if split.axes["embedding"] else jax.lax.psum(grad, fsdp.AXES)

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0],
                                 check_vma=False))
    return np.asarray(step(jnp.zeros((VOCAB, WIDTH)), tokens_BT, cotangents_BTD))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("text", ["one token 8,192 times", "Zipf"])
def test_the_gradient_of_an_embedding_adds_up_in_float32(text, devices):
    """In bfloat16 the first gave 512, and the second errors of 0.27 that depended on the mesh."""
    if text == "Zipf":
        tokens = (np.random.default_rng(0).zipf(1.2, (8, TIME)) % VOCAB).astype(np.int32)
        cotangents = random(8, TIME, WIDTH) + 0.5
    else:
        tokens, cotangents = np.full((8, TIME), 7, np.int32), np.ones((8, TIME, WIDTH), np.float32)
    exact = np.zeros((VOCAB, WIDTH))
    np.add.at(exact, tokens, cotangents)
    error = embedding_gradient(tokens, cotangents, devices) - exact
    assert np.linalg.norm(error) <= 0.01 * np.linalg.norm(exact)


def head_gradient(x_BTD, targets_BT, devices, monkeypatch):
    """That of the sum of all losses with respect to the head, as the training step makes it."""
    monkeypatch.setattr(loss, "MAX_LOGITS", 4 * VOCAB)  # chunks of sixteen tokens
    mesh = placement.make_mesh(1, devices)
    split = fsdp.split(transformer.declared(MODEL), devices, MODEL.compute_dtype)
    axis = split.axes["head"]
    of_head = PartitionSpec("fsdp") if axis == -2 else PartitionSpec(None, "fsdp")
    specs = of_head, PartitionSpec("fsdp"), PartitionSpec("fsdp")

    def local(head_DV, x_BTD, targets_BT):
        def total(head_DV):
            params = {"final_gain": jnp.ones(WIDTH), "head": head_DV}
            whole = transformer.head_params(params, MODEL, split.whole)
            x_BTMD = x_BTD.astype(MODEL.compute_dtype)[:, :, None]
            return targets_BT.size * loss.mean_token_loss(whole, x_BTMD, targets_BT, MODEL)

        grad = jax.grad(total)(head_DV)
        return grad if axis else jax.lax.psum(grad, fsdp.AXES)

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0],
                                 check_vma=False))
    return np.asarray(step(random(WIDTH, VOCAB, seed=5) / 4, x_BTD, targets_BT))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("text", ["one token 4,096 times", "Zipf"])
def test_the_gradient_of_the_head_adds_up_in_float32(text, devices, monkeypatch):
    """Sums of the head's gradient over the chunks are float32, so they lose nothing that counts."""
    if text == "Zipf":
        targets = (np.random.default_rng(0).zipf(1.2, (8, 512)) % VOCAB).astype(np.int32)
        x_BTD = random(8, 512, WIDTH) + 0.5
    else:
        targets = np.full((8, 512), 7, np.int32)
        x_BTD = np.broadcast_to(random(WIDTH), (8, 512, WIDTH))
    x_BTD = np.asarray(jnp.asarray(x_BTD, jnp.bfloat16), np.float32)
    wide = dataclasses.replace(MODEL, compute_dtype="float32")
    exact = np.asarray(jax.grad(lambda head: jnp.sum(loss.token_losses(
        {"final_gain": jnp.ones(WIDTH), "head": head}, x_BTD[:, :, None], targets, wide)))(
            random(WIDTH, VOCAB, seed=5) / 4))
    error = head_gradient(x_BTD, targets, devices, monkeypatch) - exact
    assert np.linalg.norm(error) <= 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("layout", ["joined", "apart"])
def test_residual_streams_do_not_grow(layout):
    """H_res is doubly stochastic; rounded to bfloat16, its rows add up to 1.001 and the like, which
    made a gain of 6 % over sixty sub-layers. The rounding of the result has no mean."""
    start = values(mixing_parameters(jax.random.key(0), WIDTH, 4))
    x = jnp.asarray(np.abs(random(1, 2048, 4, WIDTH)) + 1, jnp.bfloat16)

    @jax.jit
    def silent(params, x):
        streams, _ = connect(params, laid_out(x, layout), lambda x: (jnp.zeros_like(x), None),
                             20, 1e-6)
        return joined(streams)

    for number in range(4):
        params = {**start, "bias": jnp.asarray(random(start["bias"].size, seed=number))}
        kept, exact = (np.asarray(silent(params, x.astype(dtype)), np.float64)
                       for dtype in (jnp.bfloat16, jnp.float32))
        gain_M = (kept * exact).sum(axis=(0, 1, 3)) / (exact * exact).sum(axis=(0, 1, 3))
        assert (abs(gain_M - 1) < 5e-5).all(), number


def test_logits_are_not_rounded():
    """Rounded to bfloat16, one position in twelve had a tied largest logit."""
    model = dataclasses.replace(MODEL, vocab_size=4096, width=64)
    params = {"final_gain": jnp.ones(64), "head": jnp.asarray(random(64, 4096) / 8)}
    x_BTMD = jnp.asarray(random(1, 64, 1, 64, seed=1), jnp.bfloat16)
    logits, back = jax.vjp(lambda params: transformer.head(params, x_BTMD, model), params)
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(logits) != np.asarray(rounded)) > 0.9
    best = np.sort(logits, axis=-1)[..., -2:]
    assert (best[..., 0] < best[..., 1]).all()
    (grads,) = back(jnp.asarray(random(*logits.shape, seed=2)))
    assert grads["head"].dtype == jnp.float32


def test_a_profile_reads_like_the_design():
    """The names of the design stand in the program that is compiled."""
    model = dataclasses.replace(
        MODEL, streams=2, moe=MoEConfig(experts=4, top_k=2, expert_ffn=8, dense_layers=0),
        engram=EngramConfig(layers=(0,), rows_per_head=(31, 37), heads=2, head_dim=8, shards=4))
    params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    site = sites(model)[0]
    rows = {site.name: jnp.zeros((1, 8, site.hash_config.total_heads, site.dim))}
    text = jax.jit(lambda params: transformer.apply(
        params, jnp.zeros((1, 8), jnp.int32), rows, transformer.init_router_bias(model), model)[0]
    ).lower(params).as_text(debug_info=True)
    for name in ("embed", "fusion/gate", "fusion/convolution", "hyper_connection", "sinkhorn",
                 "attention", "experts/router", "experts/", "rms_norm", "head"):
        assert name in text, name


@pytest.mark.parametrize(("dtype", "named"), [("float32", 1), ("bfloat16", 0)])
def test_logits_of_float32_are_not_rounded_before_they_are_multiplied(dtype, named):
    """GPUs would multiply 10 bits of each number, TPUs 8, where nobody names a precision."""
    said = str(jax.make_jaxpr(layers.wide_linear)(jnp.ones((2, 4), dtype), jnp.ones((4, 3))))
    assert said.count("dot_general") == 1
    assert said.count("Precision.HIGHEST, Precision.HIGHEST") == named


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_routers_logits_are_float32_in_full(dtype):
    config = MoEConfig(experts=4, top_k=2, shared=0, expert_ffn=8)
    said = str(jax.make_jaxpr(lambda *inputs: moe.route(*inputs, config))(
        jnp.ones((WIDTH, 4)), jnp.ones((3, WIDTH), dtype), jnp.zeros(4)))
    assert said.count("dot_general") == said.count("Precision.HIGHEST, Precision.HIGHEST") == 1
