"""The Engram module as a pure function: against NumPy, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.errors import UserError
from engram_jax.model.engram import causal_conv, fuse, init_engram

pytestmark = pytest.mark.usefixtures("compilations")

BATCH, TIME, WIDTH = 2, 13, 32
CONFIG = EngramConfig(layers=(1, 3), rows_per_head=(31, 37), heads=2, head_dim=8, shards=4,
                      table_std=1.0)
QUICK = {"xla_backend_optimization_level": 0}  # compiles faster
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomised(tree, seed=1):
    """Every leaf moved, so that zeros and ones hide nothing."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [leaf + 0.5 * random(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)])


@functools.cache
def setting(streams, **changes):
    """(config, random fusion parameters, hidden, rows); `changes` of CONFIG."""
    config = dataclasses.replace(CONFIG, **changes)
    branches = config.branches(streams)
    params = randomised(init_engram(jax.random.key(0), WIDTH, branches, config))
    rows_BTHC = random(BATCH, TIME, config.total_heads, config.head_dim, seed=2)
    return config, params, random(BATCH, TIME, streams, WIDTH, seed=3), rows_BTHC


# --- Against NumPy ---


def oracle(params, hidden, rows, config):
    """(delta, gate) of docs/spec.md section 1 in float64, a position, stream and tap at a time."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    batch, time, streams, width = hidden.shape

    def norm(x, gain, eps):
        return x / np.sqrt(np.mean(x * x) + eps) * gain

    gated, gates = np.zeros(hidden.shape), np.zeros((batch, time, streams))
    for b, t, m in np.ndindex(batch, time, streams):
        e = rows[b, t].reshape(-1).astype(np.float64)
        bias = p.get("bias", np.zeros((streams + 1, width)))
        key, value = e @ p["project"][m] + bias[m], e @ p["project"][-1] + bias[-1]
        s = norm(hidden[b, t, m].astype(np.float64), p["query_gain"][m], config.norm_eps) @ norm(
            key, p["key_gain"][m], config.norm_eps) / width**0.5
        if config.signed_root:
            s = np.sign(s) * max(abs(s), 1e-6) ** 0.5
        gates[b, t, m] = 1 / (1 + np.exp(-s))
        gated[b, t, m] = gates[b, t, m] * value
    delta = gated.copy()
    for b, t, m in np.ndindex(batch, time, streams) if config.kernel else ():
        mixed = np.zeros(width)
        for tap in range(config.kernel):
            back = (config.kernel - 1 - tap) * (config.dilation or config.max_order)
            if t - back >= 0:
                mixed += p["conv"][tap, m] * norm(
                    gated[b, t - back, m], p["conv_gain"][m], config.conv_norm_eps)
        delta[b, t, m] += mixed / (1 + np.exp(-mixed))
    return delta, gates


@pytest.mark.parametrize(("streams", "changes"), [
    (1, {}),
    (4, {}),
    (4, {"signed_root": False}),
    (4, {"bias": True, "kernel": 0}),
    (1, {"kernel": 3, "dilation": 5, "bias": True}),
    (1, {"kernel": 1}),
    (2, {"rows_per_head": (11, 13, 17), "max_order": 4, "heads": 1}),
    (1, {"norm_eps": 0.5, "conv_norm_eps": 0.25}),
], ids=str)
def test_fuse(streams, changes):
    config, params, hidden, rows = setting(streams, **changes)
    fused = quick_jit(lambda *arguments: fuse(*arguments, config))(params, hidden, rows)
    delta, gates = oracle(params, hidden, rows, config)
    np.testing.assert_allclose(fused.delta_BTMD, delta, rtol=0, atol=2e-5 * np.abs(delta).max())
    np.testing.assert_allclose(fused.gate_BTM, gates, rtol=0, atol=1e-5)
    assert fused.gate_BTM.dtype == jnp.float32
    assert ((gates > 0) & (gates < 1)).all()
    assert streams == 1 or (np.ptp(gates, axis=-1) > 1e-3).all(), "each branch has its own gate"


def test_one_branch_reads_the_mean_of_the_streams():
    config, params, hidden, rows = setting(4, per_branch=False)
    fused = quick_jit(lambda *arguments: fuse(*arguments, config))(params, hidden, rows)
    assert params["project"].shape[0] == 2
    delta, gates = oracle(params, hidden.mean(axis=2, keepdims=True), rows, config)
    np.testing.assert_allclose(fused.delta_BTMD, delta, rtol=0, atol=2e-5 * np.abs(delta).max())
    np.testing.assert_allclose(fused.gate_BTM, gates, rtol=0, atol=1e-5)


def test_without_a_gate_everything_is_used():
    config, params, hidden, rows = setting(4, gated=False, kernel=0)
    assert sorted(params) == ["project"]
    fused = fuse(params, hidden, rows, config)
    value = rows.reshape(BATCH, TIME, 1, -1) @ np.asarray(params["project"])[0]
    np.testing.assert_allclose(fused.delta_BTMD, np.repeat(value, 4, axis=2), rtol=0, atol=1e-4)
    assert (fused.gate_BTM == 1).all()
    assert fused.gate_BTM.shape == (BATCH, TIME, 4)


def test_memory_without_a_key_gives_a_half_open_gate():
    """The score is 0, and so is its sign."""
    config, params, hidden, rows = setting(1, kernel=0)
    fused = fuse(params, hidden, jnp.zeros_like(rows), config)
    assert (fused.gate_BTM == 0.5).all()
    assert not fused.delta_BTMD.any()


def test_the_convolution_starts_as_nothing():
    """Its weights are zero and SiLU(0) = 0, so that Y = U; its weights still get a gradient."""
    params = init_engram(jax.random.key(0), WIDTH, 2, CONFIG)
    assert not params["conv"].any()
    _, _, hidden, rows = setting(2)
    without = dataclasses.replace(CONFIG, kernel=0)
    np.testing.assert_array_equal(fuse(params, hidden, rows, CONFIG).delta_BTMD,
                                  fuse(params, hidden, rows, without).delta_BTMD)
    gradient = quick_jit(jax.grad(lambda p: jnp.sum(fuse(p, hidden, rows, CONFIG).delta_BTMD ** 2)))
    grads = gradient(params)
    assert grads["conv"].any(axis=(1, 2)).all()


@pytest.mark.parametrize(("taps", "dilation"), [(4, 3), (4, 1), (1, 3), (3, 20)])
def test_causal_conv(taps, dilation):
    x_BTMD, taps_LMD = random(2, 11, 2, 3), random(taps, 2, 3, seed=1)
    expected = np.zeros_like(x_BTMD)
    for t, tap in np.ndindex(11, taps):
        if (at := t - (taps - 1 - tap) * dilation) >= 0:
            expected[:, t] += taps_LMD[tap] * x_BTMD[:, at]
    out = causal_conv(jnp.asarray(x_BTMD), jnp.asarray(taps_LMD), dilation, None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_causal_conv_stops_at_the_start_of_a_document():
    x_BTMD, taps_LMD = random(1, 11, 1, 3), jnp.asarray(random(4, 1, 3, seed=1))
    position_BT = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    out = causal_conv(jnp.asarray(x_BTMD), taps_LMD, 2, position_BT)
    parts = [causal_conv(jnp.asarray(part), taps_LMD, 2, None)
             for part in (x_BTMD[:, :5], x_BTMD[:, 5:])]
    np.testing.assert_array_equal(out, jnp.concatenate(parts, axis=1))


def test_a_row_reaches_only_the_taps_of_the_convolution():
    config, params, hidden, rows = setting(4)
    other = rows.copy()
    other[:, 2] += 1
    fused = quick_jit(lambda rows: fuse(params, hidden, rows, config).delta_BTMD)
    changed = fused(rows) != fused(other)
    assert np.flatnonzero(changed.any(axis=(0, 2, 3))).tolist() == [2, 5, 8, 11]


@pytest.mark.parametrize(("streams", "change", "word"), [
    (2, {"hidden_BTMD": (BATCH, TIME, WIDTH)}, "hidden.shape = (2, 13, 32): must be [B, T, M, D]"),
    (2, {"hidden_BTMD": (BATCH, TIME, 3, WIDTH)}, "has 3 gates and width 32, and the parameters"),
    (2, {"hidden_BTMD": (BATCH, TIME, 2, 2 * WIDTH)}, "has 2 gates and width 64"),
    (2, {"rows_BTHC": (BATCH, TIME, 4, 9)}, "rows.shape = (2, 13, 4, 9): must be (2, 13, 4, 8)"),
    (2, {"rows_BTHC": (BATCH, TIME, 8, 4)}, "rows.shape = (2, 13, 8, 4): must be (2, 13, 4, 8)"),
    (2, {"rows_BTHC": (BATCH, 1, 4, 8)}, "rows.shape = (2, 1, 4, 8)"),
    (2, {"position_BT": (BATCH, 1)}, "position.shape = (2, 1): must be (2, 13)"),
    (2, {"before_BPMD": (BATCH, 8, 2, WIDTH)}, "before.shape = (2, 8, 2, 32): must be (2, 9, 2"),
])
def test_shapes_that_do_not_go_together_are_one_clear_line(streams, change, word):
    config, params, hidden, rows = setting(streams)
    arguments = {"hidden_BTMD": hidden, "rows_BTHC": rows,
                 **{name: jnp.zeros(shape) for name, shape in change.items()}}
    with pytest.raises(UserError) as failure:
        fuse(params, config=config, **arguments)
    assert word in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(("change", "line"), [
    ({"hidden_BTMD": [[1.0]]}, r"^hidden = 'list': must be an array, \[B, T, M, D\]$"),
    ({"hidden_BTMD": np.ones((BATCH, TIME, 1, WIDTH), int)}, r"^hidden.dtype = 'int64': must be"),
    ({"rows_BTHC": {1: np.ones(3)}}, r"^rows = 'dict': must be an array, .*rows\[layer\]$"),
    ({"position_BT": np.ones((BATCH, TIME))}, r"^position.dtype = 'float64': must be a whole"),
    ({"params": {}}, r"^params = \[\]: must have project, query_gain, key_gain, conv_gain, conv"),
])
def test_what_is_no_array_or_parameter_is_one_clear_line(change, line):
    config, params, hidden, rows = setting(1)
    with pytest.raises(UserError, match=line):
        fuse(**{"params": params, "hidden_BTMD": hidden, "rows_BTHC": rows, "config": config,
                **change})


@pytest.mark.parametrize("fields", [
    {}, {"bias": True}, {"gated": False}, {"kernel": 0}])
def test_a_parameter_that_is_missing_is_named(fields):
    config, params, hidden, rows = setting(1, **fields)
    for name in params:
        with pytest.raises(UserError, match=rf"^params = .*: must have {name}, too, as"):
            fuse({other: params[other] for other in params if other != name}, hidden, rows, config)


def test_bits_of_a_bfloat16_table_are_no_rows():
    """They would be read as numbers up to 65,535."""
    config, params, hidden, rows = setting(1)
    bits = jax.lax.bitcast_convert_type(jnp.asarray(rows, jnp.bfloat16), jnp.uint16)
    with pytest.raises(UserError, match=r"rows.dtype = 'uint16': must be a float type.*decode"):
        fuse(params, hidden, bits, config)
