"""The Engram module: against NumPy, and the fused path against the drop-in module."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.config import EngramConfig
from engram_jax.errors import UserError
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.model.engram import Engram, causal_conv, fuse, init_engram
from engram_jax.tables import exchange
from engram_jax.tables.layout import TableLayout
from engram_jax.tables.row_optimizers import row_adam

BATCH, TIME, WIDTH, VOCAB = 2, 13, 32, 64
CONFIG = EngramConfig(layers=(1, 3), rows_per_head=(31, 37), heads=2, head_dim=8, shards=4,
                      table_std=1.0, vocab_size=VOCAB)
TOKENS_BT = np.random.default_rng(0).integers(0, VOCAB, (BATCH, TIME)).astype(np.int32)
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
RATE = 1e-2
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


# --- The drop-in module ---


@functools.cache
def variables(streams, config=CONFIG, layer=None):
    module = Engram(config, layer=layer)
    shapes = jax.eval_shape(lambda: module.init(
        jax.random.key(0), jnp.zeros((BATCH, TIME, streams, WIDTH)), TOKENS_BT)["params"])
    return module, {"params": randomised(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes))}


def row_path(layer=1, config=CONFIG):
    """(layout, row ids) of what the drop-in module reads."""
    hashing = NgramHash(rows_per_head=config.rows_per_head, heads=config.heads,
                        layers=config.layers, vocab_size=VOCAB, pad_id=config.pad_id,
                        seed=config.hash_seed)
    layout = TableLayout(
        rows=hashing.table_rows[layer], dim=config.head_dim, shards=config.shards)
    return layout, jnp.asarray(hashing.table_ids_numpy(TOKENS_BT, layer))


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_drop_in_is_look_up_and_fuse(layer):
    module, tree = variables(2, layer=layer)
    hidden = random(BATCH, TIME, 2, WIDTH)
    layout, ids = row_path(layer or 1)
    rows = layout.gather(tree["params"]["table"], ids)
    fused = fuse(tree["params"]["fusion"], hidden, rows, CONFIG)
    out, seen = module.apply(tree, hidden, TOKENS_BT, mutable="intermediates")
    np.testing.assert_allclose(out, hidden + fused.delta_BTMD, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(seen["intermediates"]["gate"][0], fused.gate_BTM, rtol=1e-6)


def test_hidden_may_have_no_axis_of_streams():
    module, tree = variables(1)
    hidden = random(BATCH, TIME, WIDTH)
    flat = module.apply(tree, hidden, TOKENS_BT)
    assert flat.shape == hidden.shape
    np.testing.assert_array_equal(
        flat, module.apply(tree, hidden[:, :, None], TOKENS_BT)[:, :, 0])


def test_the_dtype_of_hidden_is_kept():
    module, tree = variables(1)
    hidden = jnp.asarray(random(BATCH, TIME, WIDTH))
    half = module.apply(tree, hidden.astype(jnp.bfloat16), TOKENS_BT)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), module.apply(tree, hidden, TOKENS_BT),
                               rtol=0.1, atol=0.2)


def test_a_vocabulary_merges_tokens():
    """Tokens of one canonical id retrieve the same; without the vocabulary they do not."""
    vocabulary = CompressedVocabulary.from_lookup(np.arange(VOCAB) // 2)
    _, tree = variables(1)
    hidden = random(BATCH, TIME, WIDTH)
    for module, same in ((Engram(CONFIG, vocabulary), True), (Engram(CONFIG), False)):
        found = [np.array_equal(module.apply(tree, hidden, tokens),
                                module.apply(tree, hidden, TOKENS_BT // 2 * 2))
                 for tokens in (TOKENS_BT, TOKENS_BT // 2 * 2 + 1)]
        assert found == [same, same]


def test_drop_in_is_causal():
    module, tree = variables(1)
    hidden = random(BATCH, TIME, WIDTH)
    other = TOKENS_BT.copy()
    other[:, 5] = (other[:, 5] + 1) % VOCAB
    changed = (module.apply(tree, hidden, TOKENS_BT) != module.apply(tree, hidden, other))
    found = np.flatnonzero(changed.any(axis=(0, 2)))
    assert found[0] == 5
    assert {5, 6, 7} <= set(found.tolist()), "the 3-gram looks two tokens back"


def test_a_token_that_the_vocabulary_does_not_have():
    module, tree = variables(1)
    hidden, wrong = random(BATCH, TIME, WIDTH), TOKENS_BT.copy()
    wrong[0, 0] = VOCAB
    with pytest.raises(UserError, match=f"token id = {VOCAB}"):
        module.apply(tree, hidden, wrong)


@pytest.mark.parametrize(("module", "shape", "word"), [
    (Engram(CONFIG, layer=2), (BATCH, TIME, WIDTH), "layer = 2"),
    (Engram(dataclasses.replace(CONFIG, pad_id=VOCAB)), (BATCH, TIME, WIDTH), f"pad_id = {VOCAB}"),
    (Engram(dataclasses.replace(CONFIG, keys="random")), (BATCH, TIME, WIDTH), "keys = 'random'"),
    (Engram(dataclasses.replace(CONFIG, one_table=True)), (BATCH, TIME, WIDTH), "one_table = True"),
    (Engram(CONFIG), (BATCH, WIDTH), "hidden.shape = (2, 32)"),
    (Engram(CONFIG), (BATCH, TIME + 1, WIDTH), "token_ids.shape = (2, 13)"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_call_is_one_clear_line(module, shape, word):
    with pytest.raises(UserError) as failure:
        module.init(jax.random.key(0), jnp.zeros(shape), TOKENS_BT)
    assert word in str(failure.value)
    assert "\n" not in str(failure.value)


# --- The fused path against dense Adam on the drop-in's table ---


def loss_of(out, target):
    return jnp.mean((out - target) ** 2)


@functools.cache
def dense_step():
    """Dense gradient and optax's Adam on every parameter of the drop-in module."""
    module, transform = Engram(CONFIG), optax.adam(RATE, **ADAM)

    @quick_jit
    def step(params, state, hidden, target):
        loss, grads = jax.value_and_grad(lambda p: loss_of(
            module.apply({"params": p}, hidden, TOKENS_BT), target))(params)
        updates, state = transform.update(grads, state)
        return optax.apply_updates(params, updates), state, grads["table"], loss

    return transform.init, step


@functools.cache
def row_step():
    """Rows as an input, combined gradients, row Adam on the table."""
    layout, ids = row_path()
    transform, rows_adam = optax.adam(RATE, **ADAM), row_adam(**ADAM)

    @quick_jit
    def step(table, table_state, fusion, state, hidden, target, number):
        rows = layout.gather(table, ids)
        loss, (grads, row_grads) = jax.value_and_grad(lambda p, r: loss_of(
            hidden + fuse(p, hidden, r, CONFIG).delta_BTMD, target), (0, 1))(fusion, rows)
        unique = exchange.combine(ids.reshape(-1), row_grads.reshape(-1, layout.dim))
        table, table_state = rows_adam.update(
            layout, table, table_state, unique, number, jnp.float32(RATE))
        updates, state = transform.update(grads, state)
        fusion = optax.apply_updates(fusion, updates)
        scattered = layout.put(jnp.zeros(layout.shape), unique.ids_U, unique.grads_UD)
        return table, table_state, fusion, state, scattered, loss

    return rows_adam.init(layout), transform.init, step


@pytest.mark.parametrize("streams", [4])
def test_rows_as_an_input_train_like_a_dense_table(streams):
    """The same tokens in every step, so that dense Adam and row Adam agree exactly."""
    params = variables(streams)[1]["params"]
    init, dense = dense_step()
    state = init(params)
    table_state, init, rows = row_step()
    table, fusion, fusion_state = params["table"], params["fusion"], init(params["fusion"])
    for number in range(1, 6):
        hidden, target = (random(BATCH, TIME, streams, WIDTH, seed=10 * number + i)
                          for i in range(2))
        params, state, dense_grad, dense_loss = dense(params, state, hidden, target)
        table, table_state, fusion, fusion_state, scattered, loss = rows(
            table, table_state, fusion, fusion_state, hidden, target, jnp.int32(number))
        assert float(loss) == pytest.approx(float(dense_loss), rel=1e-6)
        biggest = float(jnp.max(jnp.abs(dense_grad)))
        np.testing.assert_allclose(scattered, dense_grad, rtol=0, atol=1e-5 * biggest)
        assert 0 < (np.asarray(dense_grad) != 0).any(axis=-1).sum() < scattered[..., 0].size
        np.testing.assert_allclose(table, params["table"], rtol=0, atol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(fusion), jax.tree.leaves(params["fusion"]),
                                strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
