"""Every implementation of attention is the plain one, forward and backward; which one is chosen."""

import dataclasses
import functools
import importlib.util
import re
import types

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from engram_jax.config import AttentionConfig, YarnConfig
from engram_jax.costs.slices import slice_of
from engram_jax.errors import UserError
from engram_jax.model import attention as attention_module
from engram_jax.model import attention_kernels, parameters
from engram_jax.model.attention import attention, attention_parameters
from engram_jax.model.attention_kernels import available, chosen, cudnn, in_chunks, splash
from engram_jax.training import placement

pytestmark = pytest.mark.usefixtures("compilations")

BATCH, HEADS, WIDTH, VALUE = 2, 2, 24, 16
# As MLA with YaRN has it: neither 1 nor a power of two.
SCALE = AttentionConfig(nope_dim=16, rope_dim=8, yarn=YarnConfig(
    factor=8, original_length=32)).score_scale
INTERPRETED = functools.partial(splash, interpret=True)
WITH_ALL_SCORES = functools.partial(cudnn, implementation="xla")
OURS = pytest.mark.parametrize("ours", [INTERPRETED, WITH_ALL_SCORES], ids=["splash", "cudnn"])


def inputs(time, dtype=np.float32):
    draw = np.random.default_rng(0).standard_normal
    return [jnp.asarray(draw((BATCH, time, HEADS, size)), dtype)
            for size in (WIDTH, WIDTH, VALUE)]


def documents(time):
    """Many short documents, one of a single token, one across the border of two blocks."""
    starts = np.random.default_rng(1).random((BATCH, time)) > 0.9
    starts[:, 120:140] = False
    starts[:, 60:62] = True
    return np.cumsum(starts, axis=1).astype(np.int32)


def attended(attend, time, documents_BT, dtype=np.float32):
    """The output and the gradients of all three inputs."""
    weights = np.random.default_rng(2).standard_normal((BATCH, time, HEADS, VALUE))

    def total(query, key, value):
        out = attend(query, key, value, documents_BT, SCALE)
        assert out.dtype == dtype
        return jnp.sum(out.astype(jnp.float32) * weights.astype(np.float32)), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs(time, dtype))
    return [np.asarray(part, np.float32) for part in (out, *grads)]


@OURS
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("time", [pytest.param(256, marks=pytest.mark.slow), 201])
def test_it_is_the_plain_one(monkeypatch, ours, isolated, time):
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)
    documents_BT = documents(time) if isolated else None
    expected = attended(in_chunks, time, documents_BT)
    for part, right in zip(attended(ours, time, documents_BT), expected, strict=True):
        np.testing.assert_allclose(part, right, rtol=1e-3, atol=1e-4 * np.abs(right).max())


@OURS
def test_documents_do_not_leak(ours):
    """Not at all: another value in one document changes no bit of the next, whose scores are so
    much smaller that they would lose against a bad mask."""
    documents_BT = (np.arange(128)[None] >= 50).astype(np.int32).repeat(BATCH, axis=0)
    query, key, value = inputs(128)
    key = key.at[:, :50].multiply(20)
    attend = jax.jit(lambda value: ours(query, key, value, documents_BT, SCALE))
    other = attend(value.at[:, 49].add(1e6))
    before = attend(value)
    np.testing.assert_array_equal(before[:, 50:], other[:, 50:])
    assert np.any(before[:, 49] != other[:, 49])


@OURS
def test_nobody_sees_what_comes_later(ours):
    query, key, value = inputs(130)
    attend = jax.jit(lambda key, value: ours(query, key, value, None, SCALE))
    before = attend(key, value)
    after = attend(key.at[:, 70].add(3), value.at[:, 70].add(1e6))
    np.testing.assert_array_equal(before[:, :70], after[:, :70])
    assert np.any(before[:, 70:] != after[:, 70:])


@OURS
def test_in_bfloat16(ours):
    """As far from float32 as the plain one is, within a factor."""
    documents_BT = documents(128)
    exact = attended(in_chunks, 128, documents_BT)

    def error(attend):
        got = attended(attend, 128, documents_BT, jnp.bfloat16)
        return np.array([np.abs(part - right).max() / np.abs(right).max()
                         for part, right in zip(got, exact, strict=True)])

    assert np.all(error(ours) < 3 * error(in_chunks) + 1e-3), (error(ours), error(in_chunks))


def squares(program, time):
    """Arrays of a program with two axes of a sequence's length."""
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", program)}
    return [dims for dims in arrays if dims.count(time) >= 2]


def compiled(attend, time):
    spec = [jax.ShapeDtypeStruct((1, time, 1, size), jnp.float32) for size in (8, 8, 4)]
    documents_BT = jax.ShapeDtypeStruct((1, time), jnp.int32)
    total = jax.grad(lambda *parts: jnp.sum(attend(*parts, SCALE)), argnums=(0, 1, 2))
    return jax.jit(total).lower(*spec, documents_BT).compile()


def test_no_program_has_all_scores():
    """Neither forward nor backward; the whole of a short sequence is one chunk, and may."""
    for time in (2048, 8192):
        assert not squares(compiled(in_chunks, time).as_text(), time)
    assert squares(compiled(in_chunks, 512).as_text(), 512)
    assert squares(compiled(WITH_ALL_SCORES, 2048).as_text(), 2048)


def test_memory_is_flat():
    """A sequence of twice the length takes its own inputs and outputs more, and no scores."""
    short, long = (compiled(in_chunks, time).memory_analysis().temp_size_in_bytes
                   for time in (8192, 16384))
    assert long < 1.1 * short


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="libtpu is not installed (extra aot)")
@pytest.mark.parametrize("topology", ["v5p:1x1x1", "v5e:1x1"])
@pytest.mark.parametrize("widths", [(192, 128), (48, 32)])
def test_splash_compiles_for_tpus(topology, widths):
    """MLA's keys are wider than its values, and a narrow model's narrower than a lane."""
    time, lies = 2048, jax.sharding.SingleDeviceSharding(slice_of(topology).devices[0])
    spec = [jax.ShapeDtypeStruct((1, time, 2, size), jnp.bfloat16, sharding=lies)
            for size in (widths[0], *widths)]
    documents_BT = jax.ShapeDtypeStruct((1, time), jnp.int32, sharding=lies)
    total = jax.grad(lambda *parts: jnp.sum(splash(*parts, SCALE).astype(jnp.float32)),
                     argnums=(0, 1, 2))
    program = jax.jit(total).lower(*spec, documents_BT).compile().as_text()
    kernels = set(re.findall(r"%splash_mha_(fwd|dq|dkv)_segmented", program))
    assert kernels == {"fwd", "dq", "dkv"}
    assert not squares(program, time)


def device(platform, kind, version="", capability="0.0"):
    return types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability,
        client=types.SimpleNamespace(platform_version=version))


CPU = device("cpu", "cpu")
TPU = device("tpu", "TPU v5p")
H100 = device("gpu", "NVIDIA H100", "PJRT C API\ncuda 13000", "9.0")
A100 = device("gpu", "NVIDIA A100", "PJRT C API\ncuda 13000", "8.0")
AMD = device("gpu", "MI300", "rocm 70000")
PAPER = AttentionConfig()  # heads of 192 and 128
NARROW = AttentionConfig(nope_dim=64, rope_dim=32, value_dim=64)
BROAD = AttentionConfig(nope_dim=192, rope_dim=64, value_dim=128)


@pytest.mark.parametrize(("config", "on", "dtype", "isolated", "name"), [
    (PAPER, CPU, "bfloat16", True, "xla"),
    (PAPER, TPU, "bfloat16", True, "splash"),
    (NARROW, TPU, "float32", False, "splash"),
    (PAPER, H100, "bfloat16", True, "xla"),
    (PAPER, H100, "float32", True, "xla"),
    (PAPER, A100, "bfloat16", False, "xla"),
    (NARROW, A100, "bfloat16", True, "xla"),
    (BROAD, H100, "bfloat16", False, "xla"),
    (BROAD, H100, "bfloat16", True, "xla"),
    (NARROW, AMD, "bfloat16", False, "xla"),
])
def test_auto(config, on, dtype, isolated, name):
    assert chosen(config, dtype, isolated, on) == name


@pytest.mark.parametrize(("config", "on", "dtype", "isolated", "names"), [
    (PAPER, TPU, "bfloat16", True, ("splash", "xla")),
    (PAPER, H100, "bfloat16", True, ("cudnn", "xla")),
    (PAPER, H100, "float32", True, ("xla",)),
    (PAPER, A100, "bfloat16", False, ("xla",)),
    (NARROW, A100, "bfloat16", True, ("cudnn", "xla")),
    (BROAD, H100, "bfloat16", True, ("xla",)),
    (NARROW, AMD, "bfloat16", False, ("xla",)),
])
def test_what_can_be_had(config, on, dtype, isolated, names):
    assert available(config, dtype, isolated, on) == names
    for name in names:
        named = dataclasses.replace(config, implementation=name)
        assert chosen(named, dtype, isolated, on) == name


@pytest.mark.parametrize(("name", "on", "dtype", "words"), [
    ("splash", CPU, "bfloat16", "runs on TPUs, and the device is cpu"),
    ("cudnn", TPU, "bfloat16", "NVIDIA's GPUs, and the device is TPU v5p"),
    ("cudnn", AMD, "bfloat16", "NVIDIA's GPUs, and the device is MI300"),
    ("cudnn", H100, "float32", "bfloat16, and model.compute_dtype is float32"),
    ("cudnn", A100, "bfloat16", "up to 128 wide on NVIDIA A100, and these need 192"),
])
def test_what_cannot_be_had(name, on, dtype, words):
    with pytest.raises(UserError, match="implementation") as refused:
        chosen(dataclasses.replace(PAPER, implementation=name), dtype, False, on)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="one of auto, xla, splash, cudnn"):
        AttentionConfig(implementation="flash")


def test_a_run_is_settled_by_its_mesh():
    run = placement.settled(micro.micro("text.txt"), placement.single_mesh())
    assert run.model.attention.implementation == "xla"


@pytest.mark.parametrize("isolated", [False, True])
def test_heads_first_is_time_first(monkeypatch, isolated):
    """What a TPU makes of a whole sequence, the kernel interpreted, forward and backward."""
    config = AttentionConfig(heads=2, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5)
    monkeypatch.setattr(attention_kernels, "splash_by_head", functools.partial(
        attention_kernels.splash_by_head, interpret=True))
    params = parameters.values(attention_parameters(jax.random.key(0), 16, config))
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 16)), jnp.float32)
    documents_BT = jnp.cumsum(jnp.arange(24)[None] % jnp.array([[7], [11]]) == 0, axis=1)

    def out_and_gradients(implementation):
        def of(params, x_BTD):
            own = dataclasses.replace(config, implementation=implementation)
            return attention(params, x_BTD, own, 1e-6, documents_BT if isolated else None)

        out, back = jax.vjp(of, params, x_BTD)
        return out, back(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
                 out_and_gradients("splash"), out_and_gradients("xla"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("width", "yarn"), [
    (2, None), (10, None), (64, YarnConfig(factor=4.0, original_length=64))])
def test_rope_by_head_is_rope_to_the_bit(dtype, width, yarn):
    """Forward and backward; positions begin elsewhere than at 0, as those of a stretch do."""
    config = AttentionConfig(rope_dim=width, yarn=yarn)
    x_BHTR = jax.random.normal(jax.random.key(0), (2, 3, 7, width)).astype(dtype)
    positions_1T = jnp.arange(15_000, 15_007)[None]

    def by_time(x_BHTR):
        return jnp.swapaxes(
            attention_module.rope(jnp.swapaxes(x_BHTR, 1, 2), positions_1T, config), 1, 2)

    ours, back = jax.vjp(
        lambda x: attention_module._rope_by_head(x, positions_1T, config), x_BHTR)
    theirs, their_back = jax.vjp(by_time, x_BHTR)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(back(2 * ours)[0], their_back(2 * ours)[0])
    assert "Precision.HIGHEST" in str(jax.make_jaxpr(attention_module._turned)(
        x_BHTR, *jnp.ones((2, 1, 1, 7, width))))


def test_gradients_of_a_key_that_heads_share_add_up_in_float32():
    """In bfloat16 each 1 would be lost."""
    first_BHTN, shared_B1TR = jnp.ones((1, 4, 1, 2), "bfloat16"), jnp.ones((1, 1, 1, 3), "bfloat16")
    out, back = jax.vjp(attention_module._beside, first_BHTN, shared_B1TR)
    assert out.shape == (1, 4, 1, 5)
    grad_BHTX = jnp.stack([jnp.full((1, 1, 5), value) for value in (256, 1, 1, 2)], 1)
    of_first, of_shared = back(grad_BHTX.astype("bfloat16"))
    assert of_first[0, :, 0, 0].tolist() == [256, 1, 1, 2]
    assert of_shared.astype("float32").tolist() == [[[[260] * 3]]]
