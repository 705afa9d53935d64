"""Engram as Linen and NNX modules: the pure function's numbers, token by token as all at once."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import engram_jax.model.nnx
from engram_jax.config import EngramConfig
from engram_jax.errors import UserError
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.model.engram import fuse, init_engram
from engram_jax.model.linen import Engram, EngramFusion
from engram_jax.tables import exchange
from engram_jax.tables.layout import TableLayout
from engram_jax.tables.row_optimizers import row_adam

pytestmark = pytest.mark.usefixtures("compilations")

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


# --- Rows as an input ---


def fusion(streams, **changes):
    """(config, random parameters, hidden, rows)."""
    config = dataclasses.replace(CONFIG, **changes)
    params = randomised(init_engram(jax.random.key(0), WIDTH, config.branches(streams), config))
    return (config, params, random(BATCH, TIME, streams, WIDTH, seed=3),
            random(BATCH, TIME, config.total_heads, config.head_dim, seed=2))


def nnx_module(config, params, streams):
    """The NNX module with these parameters."""
    module = engram_jax.model.nnx.EngramFusion(WIDTH, config, streams=streams, rngs=nnx.Rngs(0))
    assert sorted(module.params) == sorted(params)
    for name, leaf in params.items():
        assert module.params[name].shape == leaf.shape
        module.params[name][...] = jnp.asarray(leaf)
    return module


@pytest.mark.parametrize(("streams", "changes"), [
    (1, {}), (3, {"per_branch": False}), (2, {"kernel": 0, "gated": False})], ids=str)
def test_the_modules_are_the_pure_function(streams, changes):
    config, params, hidden, rows = fusion(streams, **changes)
    position = np.arange(TIME, dtype=np.int32)[None].repeat(BATCH, axis=0) % 5
    fused = fuse(params, hidden, rows, config, position)
    expected = hidden + fused.delta_BTMD
    out, seen = EngramFusion(config).apply(
        {"params": {"fusion": params}}, hidden, rows, position, mutable="intermediates")
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(seen["intermediates"]["gate"][0], fused.gate_BTM)
    module = nnx_module(config, params, streams)
    np.testing.assert_array_equal(module(hidden, rows, position), expected)


def test_a_module_begins_as_the_pure_function_does():
    config, _, hidden, rows = fusion(2)
    tree = EngramFusion(config).init(jax.random.key(0), hidden, rows)
    module = engram_jax.model.nnx.EngramFusion(WIDTH, config, streams=2, rngs=nnx.Rngs(0))
    for params in (tree["params"]["fusion"], module.params):
        assert {name: leaf.shape for name, leaf in params.items()} == {
            name: leaf.shape for name, leaf in
            jax.eval_shape(lambda: init_engram(jax.random.key(0), WIDTH, 2, config)).items()}
        assert not params["conv"][...].any()
        assert np.std(params["project"][...]) == pytest.approx(config.memory_dim**-0.5, rel=0.1)


def test_an_nnx_module_trains():
    config, params, hidden, rows = fusion(1)
    module = nnx_module(config, params, 1)

    @nnx.jit
    def loss_and_grads(module, rows):
        return nnx.value_and_grad(
            lambda module, rows: jnp.mean(module(hidden[:, :, 0], rows) ** 2), argnums=(0, 1))(
                module, rows)

    _, (grads, row_grads) = loss_and_grads(module, rows)
    expected, expected_rows = jax.grad(lambda params, rows: jnp.mean(
        (hidden + fuse(params, hidden, rows, config).delta_BTMD) ** 2), (0, 1))(params, rows)
    for name, leaf in expected.items():
        np.testing.assert_allclose(grads.params[name][...], leaf, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(row_grads, expected_rows, rtol=1e-5, atol=1e-6)


CUTS = [range(TIME + 1), (0, 1, 6, 7, TIME)]


@pytest.mark.parametrize("cuts", CUTS, ids=["one by one", "chunks"])
def test_fusions_go_on_where_they_ended(cuts):
    config, params, hidden, rows = fusion(2)
    whole = hidden + fuse(params, hidden, rows, config).delta_BTMD
    linen, module = EngramFusion(config, decode=True), nnx_module(config, params, 2)
    module.init_cache(BATCH)
    cache = linen.init(jax.random.key(0), hidden, rows)["cache"]
    for start, stop in itertools.pairwise(cuts):
        part = hidden[:, start:stop], rows[:, start:stop]
        out, kept = linen.apply(
            {"params": {"fusion": params}, "cache": cache}, *part, mutable="cache")
        cache = kept["cache"]
        np.testing.assert_allclose(out, whole[:, start:stop], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(module(*part), whole[:, start:stop], rtol=1e-5, atol=1e-5)


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
    vocabulary = CompressedVocabulary(np.arange(VOCAB) // 2)
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
    (Engram(dataclasses.replace(CONFIG, table_dtype="bfloat16")), (BATCH, TIME, WIDTH),
     "table_dtype = 'bfloat16'"),
    (Engram(CONFIG), (BATCH, WIDTH), "hidden.shape = (2, 32)"),
    (Engram(CONFIG), (BATCH, TIME + 1, WIDTH), "token_ids.shape = (2, 13)"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_call_is_one_clear_line(module, shape, word):
    with pytest.raises(UserError) as failure:
        module.init(jax.random.key(0), jnp.zeros(shape), TOKENS_BT)
    assert word in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(("change", "line"), [
    ({"token_ids": TOKENS_BT * 1.0}, r"^token_ids.dtype = 'float64': must be a whole-number type"),
    ({"token_ids": TOKENS_BT.tolist()}, r"^token_ids = 'list': must be an array"),
    ({"position": TOKENS_BT * 1.0}, r"^position.dtype = 'float64': must be a whole-number type"),
    ({"history": TOKENS_BT * 1.0}, r"^history.dtype = 'float64': must be a whole-number type"),
    ({"hidden": {1: 2}}, r"^hidden = 'dict': must be an array"),
    ({"hidden": np.ones((BATCH, TIME, WIDTH), int)}, r"^hidden.dtype = 'int64': must be a float"),
])
def test_arguments_of_the_drop_in_are_named_as_it_names_them(change, line):
    given = {"hidden": jnp.zeros((BATCH, TIME, WIDTH)), "token_ids": TOKENS_BT, **change}
    with pytest.raises(UserError, match=line):
        Engram(CONFIG).init(jax.random.key(0), **given)


def test_one_block_needs_no_layers():
    config = EngramConfig(rows_per_head=(31, 37), heads=2, head_dim=8, shards=4, vocab_size=VOCAB)
    tree = Engram(config).init(jax.random.key(0), jnp.zeros((1, 3, 8)), TOKENS_BT[:1, :3])
    assert sorted(tree["params"]) == ["fusion", "table"]


def test_a_vocabulary_is_not_used_without_compression():
    vocabulary = CompressedVocabulary(np.arange(VOCAB) // 2)
    raw = dataclasses.replace(CONFIG, compress=False)
    _, tree = variables(1)
    hidden = random(BATCH, TIME, WIDTH)
    np.testing.assert_array_equal(Engram(raw, vocabulary).apply(tree, hidden, TOKENS_BT),
                                  Engram(CONFIG).apply(tree, hidden, TOKENS_BT))


@pytest.mark.parametrize("wrong", [VOCAB, 200_000, -1])
def test_an_unknown_token_under_jit_reads_no_row(wrong):
    """Its own n-grams and those that look back at it are NaN; nothing else changes."""
    config = dataclasses.replace(CONFIG, kernel=0)
    module, tree = variables(1, config)
    hidden, tokens = random(BATCH, TIME, WIDTH), jnp.asarray(TOKENS_BT)
    apply = quick_jit(module.apply)
    good, bad = apply(tree, hidden, tokens), apply(tree, hidden, tokens.at[0, 2].set(wrong))
    unknown = np.zeros((BATCH, TIME), bool)
    unknown[0, 2:5] = True
    np.testing.assert_array_equal(np.isnan(bad).all(axis=-1), unknown)
    np.testing.assert_array_equal(np.asarray(bad)[~unknown], np.asarray(good)[~unknown])


@pytest.mark.parametrize("cuts", CUTS, ids=["one by one", "chunks"])
@pytest.mark.parametrize("documents", [False, True])
def test_the_drop_in_goes_on_where_it_ended(cuts, documents):
    _, tree = variables(2)
    module = Engram(CONFIG, decode=True)
    hidden = random(BATCH, TIME, 2, WIDTH)
    position = np.arange(TIME)[None].repeat(BATCH, axis=0) % (5 if documents else 99)
    whole = Engram(CONFIG).apply(tree, hidden, TOKENS_BT, position)
    assert documents == bool((whole != Engram(CONFIG).apply(tree, hidden, TOKENS_BT)).any())
    cache = module.init(jax.random.key(0), hidden, TOKENS_BT)["cache"]
    assert (cache["history"] == -1).all(), "to begin is not to go on"
    apply = quick_jit(functools.partial(module.apply, mutable="cache"))
    for start, stop in itertools.pairwise(cuts):
        part = slice(start, stop)
        out, kept = apply({**tree, "cache": cache}, hidden[:, part], TOKENS_BT[:, part],
                          position[:, part])
        cache = kept["cache"]
        np.testing.assert_allclose(out, whole[:, part], rtol=1e-5, atol=1e-5)


def test_history_is_what_came_before():
    config = dataclasses.replace(CONFIG, kernel=0)
    module, tree = variables(1, config)
    hidden = random(BATCH, TIME, WIDTH)
    whole = module.apply(tree, hidden, TOKENS_BT)
    later = module.apply(tree, hidden[:, 4:], TOKENS_BT[:, 4:], history=TOKENS_BT[:, :4])
    np.testing.assert_allclose(later, whole[:, 4:], rtol=1e-6, atol=1e-6)
    start = module.apply(tree, hidden, TOKENS_BT, history=np.full((BATCH, 2), -1))
    np.testing.assert_array_equal(start, whole)
    with pytest.raises(UserError, match=r"history.shape = \(2, 1\): must be \[2, at least 2\]"):
        module.apply(tree, hidden, TOKENS_BT, history=TOKENS_BT[:, :1])


def test_a_block_with_flax_attention_decodes_with_one_cache():
    class Block(nn.Module):
        decode: bool = False

        @nn.compact
        def __call__(self, hidden, token_ids):
            hidden = Engram(CONFIG, decode=self.decode, name="engram")(hidden, token_ids)
            mask = None if self.decode else nn.make_causal_mask(token_ids)
            return hidden + nn.MultiHeadDotProductAttention(
                num_heads=2, decode=self.decode, name="attention")(hidden, mask=mask)

    hidden = jnp.asarray(random(BATCH, TIME, WIDTH))
    tree = quick_jit(Block().init)(jax.random.key(0), hidden, TOKENS_BT)
    whole = quick_jit(Block().apply)(tree, hidden, TOKENS_BT)
    cache = quick_jit(Block(decode=True).init)(jax.random.key(0), hidden, TOKENS_BT)["cache"]
    apply = quick_jit(functools.partial(Block(decode=True).apply, mutable="cache"))
    for time in range(TIME):
        out, kept = apply({**tree, "cache": cache}, hidden[:, time:time + 1],
                          TOKENS_BT[:, time:time + 1])
        cache = kept["cache"]
        np.testing.assert_allclose(out[:, 0], whole[:, time], rtol=1e-4, atol=1e-5)


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
