"""The network: causality, documents, streams, experts, and what every named model promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import (
    AttentionConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OverEncodingConfig,
)
from engram_jax.hashing.addressing import address, sites
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.model import hyper_connections, parameters, transformer
from engram_jax.model.attention import rope
from engram_jax.model.attention_kernels import visible
from engram_jax.model.documents import documents
from engram_jax.model.hyper_connections import connect, mixing, mixing_parameters, sinkhorn
from engram_jax.model.layers import ffn, rms_norm
from engram_jax.model.moe import (
    block_size,
    experts_here,
    experts_weighed_first,
    group,
    moe,
    moe_parameters,
    rebalanced,
    route,
)
from engram_jax.model.over_encoding import encode
from engram_jax.model.parameters import values
from engram_jax.model.transformer import Segment, segments
from engram_jax.recipes import RECIPES, recipe
from engram_jax.settings import changed
from engram_jax.tables.layout import gather_rows, layout_of

pytestmark = pytest.mark.usefixtures("compilations")

BATCH, TIME, VOCAB, WIDTH = 2, 16, 64, 32
HASH = {"rows_per_head": (31, 37), "heads": 2, "shards": 4, "compress": False, "table_std": 1.0}


def engram(*layers):
    return EngramConfig(layers=layers, head_dim=8, **HASH)


PLAIN = ModelConfig(
    vocab_size=VOCAB, width=WIDTH, depth=3, ffn=48, compute_dtype="float32", remat="none",
    attention=AttentionConfig(heads=2, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8))
MOE = MoEConfig(experts=4, top_k=2, shared=1, expert_ffn=16)
VARIANTS = {
    "plain": PLAIN,
    "tied": dataclasses.replace(PLAIN, tied_head=True),
    "streams": dataclasses.replace(PLAIN, streams=4, sinkhorn_rounds=4),
    "engram": dataclasses.replace(PLAIN, engram=engram(1)),
    "engram first": dataclasses.replace(PLAIN, engram=engram(0)),
    "over-encoding": dataclasses.replace(PLAIN, over_encoding=OverEncodingConfig(**HASH)),
    "experts": dataclasses.replace(PLAIN, moe=MOE),
    "everything": dataclasses.replace(
        PLAIN, moe=dataclasses.replace(MOE, dense_layers=0), streams=2, sinkhorn_rounds=2,
        engram=engram(0, 2), over_encoding=OverEncodingConfig(**HASH), tied_head=True),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomised(tree, std=0.2):
    """Every leaf moved, so that zeros and ones hide nothing."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [leaf + std * random(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def random_like(shapes):
    """Random leaves of the shapes of a tree, of the size that matrices [..., in, out] have."""
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([
        jnp.asarray(random(*leaf.shape, seed=i) * max(leaf.shape[-2:-1] or (1,)) ** -0.5)
        for i, leaf in enumerate(leaves)])


@functools.cache
def parts(config):
    """(params, tables, addressing), all random."""
    params = random_like(jax.eval_shape(lambda: transformer.init(config, jax.random.key(0))))
    tables = {site.name: jnp.asarray(random(*layout_of(site).shape, seed=99))
              for site in sites(config)}
    return params, tables, address(config, CompressedVocabulary.identity(VOCAB), 0)


def rows_of(config, tokens_BT, starts_BT):
    _, tables, addressing = parts(config)
    position_BT = documents(starts_BT).position_BT if config.isolate_documents else None
    ids = addressing.ids(tokens_BT, position_BT)
    return gather_rows(config, tables, ids)


@functools.cache
def network(config):
    """Jitted (tokens, starts) -> logits."""
    def logits(params, tokens_BT, starts_BT):
        rows = rows_of(config, tokens_BT, starts_BT)
        return transformer.apply(
            params, tokens_BT, rows, transformer.init_router_bias(config), config, starts_BT)[0]

    jitted = jax.jit(logits)
    return lambda tokens_BT, starts_BT=NO_STARTS: np.asarray(
        jitted(parts(config)[0], tokens_BT, starts_BT))


TOKENS_BT = np.random.default_rng(0).integers(0, VOCAB, (BATCH, TIME)).astype(np.int32)
NO_STARTS = np.zeros((BATCH, TIME), bool)
STARTS = np.isin(np.arange(TIME), [0, 5, 10])[None].repeat(BATCH, axis=0)


def perturbed(*times):
    tokens = TOKENS_BT.copy()
    tokens[:, times] = (tokens[:, times] + 17) % VOCAB
    return tokens


def same(config, ours, theirs):
    """Equal bits; experts regroup all tokens of a batch, which may reorder a sum."""
    if config.moe is None:
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def differ(ours, theirs):
    """For each time, whether the logits differ visibly."""
    return np.abs(ours - theirs).max(axis=(0, 2)) > 1e-4


# --- Causality and documents ---


@variants
def test_causality(config):
    before, after = network(config)(TOKENS_BT), network(config)(perturbed(7))
    same(config, before[:, :7], after[:, :7])
    assert differ(before, after)[7:10].all()


def test_only_the_past_is_visible():
    np.testing.assert_array_equal(visible(5, None)[0], np.tril(np.ones((5, 5), bool)))
    numbers = jnp.array([[0, 0, 1, 1, 1]])
    expected = np.tril(np.ones((5, 5), bool))
    expected[2:, :2] = False
    np.testing.assert_array_equal(visible(5, numbers)[0], expected)


def test_documents():
    found = documents(jnp.array([[False, False, True, False, True], [True, True, False, False,
                                                                      False]]))
    assert found.number_BT.tolist() == [[0, 0, 1, 1, 2], [1, 2, 2, 2, 2]]
    assert found.position_BT.tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["plain", "engram", "over-encoding", "everything"])
def test_a_document_knows_nothing_of_the_one_before(name):
    """Its logits do not move with it, and are those of the document alone."""
    config = VARIANTS[name]
    isolated = dataclasses.replace(config, isolate_documents=True)
    before = network(isolated)(TOKENS_BT, STARTS)
    after = network(isolated)(perturbed(5, 6, 7, 8, 9), STARTS)
    same(config, before[:, :5], after[:, :5])
    same(config, before[:, 10:], after[:, 10:])
    assert differ(before, after)[5:10].all()

    alone = np.concatenate([TOKENS_BT[:, 10:], TOKENS_BT[:, :10]], axis=1)
    moved = network(isolated)(alone, np.isin(np.arange(TIME), [0, 6])[None].repeat(BATCH, axis=0))
    np.testing.assert_allclose(moved[:, :6], before[:, 10:], rtol=0, atol=2e-5)


@variants
def test_documents_run_together_unless_isolated(config):
    before, after = (network(config)(tokens, STARTS) for tokens in (TOKENS_BT, perturbed(8, 9)))
    assert differ(before, after)[8:].all()
    np.testing.assert_array_equal(before, network(config)(TOKENS_BT, NO_STARTS))


@pytest.mark.parametrize("name", ["engram", "over-encoding"])
def test_ngrams_stop_at_the_start_of_a_document(name):
    config = VARIANTS[name]
    _, _, addressing = parts(config)
    position_BT = documents(jnp.asarray(STARTS)).position_BT
    (isolated,), (together,) = (addressing.ids(TOKENS_BT, p).values() for p in (position_BT, None))
    changed = (isolated != together).any(axis=(0, 2))
    assert np.flatnonzero(changed).tolist() == [5, 6, 10, 11]


@pytest.mark.parametrize("name", ["engram first", "over-encoding", "everything"])
def test_rows_are_causal_too(name):
    """The network alone: rows of one position reach no earlier logits, and do reach its own."""
    config = VARIANTS[name]
    params, _, _ = parts(config)
    rows = rows_of(config, TOKENS_BT, NO_STARTS)
    run = jax.jit(lambda rows: transformer.apply(
        params, TOKENS_BT, rows, transformer.init_router_bias(config), config)[0])
    before = np.asarray(run(rows))
    for site in rows:
        after = np.asarray(run(rows | {site: rows[site].at[:, 6].add(1.0)}))
        same(config, before[:, :6], after[:, :6])
        assert differ(before, after)[6:].all()


def test_rope_scores_depend_on_the_distance_alone():
    x, y = (jnp.asarray(random(1, 1, 1, 8, seed=seed)) for seed in (0, 1))
    config = AttentionConfig(rope_dim=8, rope_theta=100.0)

    def score(t, s):
        at_t, at_s = jnp.array([[t]]), jnp.array([[s]])
        return float(jnp.sum(rope(x, at_t, config) * rope(y, at_s, config)))

    assert score(5.0, 2.0) == pytest.approx(score(13.0, 10.0), abs=1e-5)
    assert abs(score(5.0, 2.0) - score(5.0, 3.0)) > 1e-3
    np.testing.assert_array_equal(rope(x, jnp.array([[0]]), config), x)


# --- Residual streams ---


@pytest.mark.parametrize("streams", [2, 4])
def test_sinkhorn_is_doubly_stochastic(streams):
    matrices = sinkhorn(jnp.asarray(random(50, streams, streams)), 20)
    assert (matrices > 0).all()
    for axis in (-1, -2):
        np.testing.assert_allclose(matrices.sum(axis=axis), 1, rtol=0, atol=1e-4)


def test_sinkhorn_begins_with_columns_and_ends_with_rows():
    logits = random(3, 3)
    positive = np.exp(logits)
    columns = positive / positive.sum(axis=0, keepdims=True)
    expected = columns / columns.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sinkhorn(jnp.asarray(logits), 1), expected, rtol=1e-5)


def log_sinkhorn(logits, rounds):
    """In float64 and of logarithms, for logits of any size."""
    for _ in range(rounds):
        for axis in (-2, -1):
            logits = logits - np.logaddexp.reduce(logits, axis=axis, keepdims=True)
    return np.exp(logits)


WAYS = ("_rounds", "_rounds_unrolled", "_rounds_of_entries")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("column", [30.0, 46.0, -46.0, -110.0, 1e4])
def test_sinkhorn_of_large_logits(way, column):
    """A whole column far from 0 changes nothing: not H_res, and not its gradient."""
    compute = functools.partial(getattr(hyper_connections, way), 5)
    logits, weight = random(40, 3, 3), random(40, 3, 3)
    moved = logits.copy()
    moved[..., 1] += np.float32(column)
    # Of what float32 holds: at 1e4 the logits themselves have lost bits.
    expected = log_sinkhorn(moved.astype(np.float64), 5)
    found, back = jax.vjp(compute, jnp.asarray(moved))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    _, plain = jax.vjp(compute, jnp.asarray(moved - np.float32([0, column, 0])))
    np.testing.assert_allclose(*(pull(jnp.asarray(weight))[0] for pull in (back, plain)),
                               rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_sinkhorn_of_a_row_that_nothing_is_left_of(way):
    """What the other rows take whole: finite, and the rows are normalised to the end."""
    logits = jnp.asarray([[0.0, 0.0, 0.0], [-300.0, -60.0, -80.0], [1.0, 2.0, 3.0]])[None]
    compute = functools.partial(getattr(hyper_connections, way), 20)
    found, back = jax.vjp(compute, logits)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    (gradient,) = back(jnp.asarray(random(1, 3, 3)))
    assert np.isfinite(gradient).all()
    assert (gradient[0, 1] == 0).all(), "what is negligible counts as its bound"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("streams", [2, 4])
def test_sinkhorn_of_small_rows_in_small_columns(way, streams):
    """Its gradient is divided by both. The first of these ended a run of 4 million tokens."""
    levels = np.float32([-100, -83, -60, -39.5, -21, -19, -9.5, 0, 19, 21, 39.5, 74, 100])
    draw = np.random.default_rng(0).choice(levels, (4000, streams, streams))
    draw[0, :2, :2] = [[74.278488, -39.512932], [-9.514517, -82.734436]]
    compute = functools.partial(getattr(hyper_connections, way), 20)
    kept, back = jax.vjp(compute, jnp.asarray(draw))
    np.testing.assert_allclose(kept.sum(-1), 1, rtol=1e-6)
    if streams == 2:
        np.testing.assert_allclose(kept[0], 0.5, rtol=1e-6)  # by its bounds, as docs/design.md says
    assert np.isfinite(back(jnp.asarray(random(4000, streams, streams)))[0]).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e9, 1e20, 3e38])
def test_sinkhorn_of_logits_beside_which_forty_is_nothing(way, size):
    logits = jnp.asarray([[size, 0.0, -size], [0.0, size, -size], [0.0, 0.0, -size / 2]],
                         jnp.float32)[None]
    compute = functools.partial(getattr(hyper_connections, way), 3)
    kept, back = jax.vjp(compute, logits)
    np.testing.assert_allclose(kept[0], np.eye(3), atol=1e-6)
    assert np.isfinite(back(jnp.asarray(random(1, 3, 3)))[0]).all()


@pytest.mark.parametrize("way", WAYS)
def test_sinkhorn_of_usual_logits_is_that_of_their_exponentials(way):
    """Bounds move no bit where they are not reached."""
    logits = 5 * jnp.asarray(random(40, 4, 4))
    bounded = jax.jit(functools.partial(getattr(hyper_connections, way), 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hyper_connections, "_positive", lambda logits, axis: jnp.exp(logits))
        free = jax.jit(functools.partial(getattr(hyper_connections, way), 3))(logits)
    np.testing.assert_array_equal(bounded(logits), free)


@pytest.mark.parametrize("streams", [2, 4])
def test_streams_at_the_start(streams):
    """A sub-layer reads the mean, writes to all, and the streams keep to themselves."""
    params = values(mixing_parameters(jax.random.key(0), WIDTH, streams))
    assert params["scale"].tolist() == pytest.approx([0.01] * 3)
    mix = mixing(params, jnp.asarray(random(2, 5, streams, WIDTH)), 20, 1e-6)
    np.testing.assert_allclose(mix.pre_BTM, 1 / streams, atol=0.02)
    np.testing.assert_allclose(mix.post_BTM, 1, atol=0.05)
    identity = np.broadcast_to(np.eye(streams), mix.residual_BTMM.shape)
    np.testing.assert_allclose(mix.residual_BTMM, identity, atol=0.01)
    assert np.ptp(mix.pre_BTM) > 0, "the mixing is computed for each token"


@pytest.mark.parametrize("layout", ["joined", "apart"])
def test_connect(layout):
    """x' = H_res x + H_post^T F(H_pre x), in NumPy."""
    streams = 3
    params = randomised(values(mixing_parameters(jax.random.key(0), WIDTH, streams)), std=0.5)
    x = random(2, 5, streams, WIDTH)
    out, extra = connect(params, hyper_connections.laid_out(jnp.asarray(x), layout),
                         lambda y: (jnp.tanh(y), "seen"), 20, 1e-6)
    out = hyper_connections.joined(out)
    flat = x.reshape(2, 5, -1)
    raw = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6) @ params["project"]
    raw = np.split(np.asarray(raw), [streams, 2 * streams], axis=-1)
    bias = np.split(np.asarray(params["bias"]), [streams, 2 * streams])
    pre, post, keep = (a * r + b for a, r, b in zip(
        np.asarray(params["scale"]), raw, bias, strict=True))
    residual = sinkhorn(keep.reshape(2, 5, streams, streams), 20)
    inner = np.tanh(np.einsum("btm,btmd->btd", 1 / (1 + np.exp(-pre)), x))
    expected = np.einsum("btij,btjd->btid", residual, x) + np.einsum(
        "btm,btd->btmd", 2 / (1 + np.exp(-post)), inner)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    assert extra == "seen"


def test_one_stream_is_the_plain_residual():
    assert values(mixing_parameters(jax.random.key(0), WIDTH, 1)) == {}
    x = jnp.asarray(random(2, 5, 1, WIDTH))
    out, _ = connect({}, x, lambda y: (jnp.tanh(y), None), 20, 1e-6)
    np.testing.assert_array_equal(out, x + jnp.tanh(x))


def test_four_streams_start_as_one():
    """With the token-wise part of the mixing off, all streams carry the plain residual."""
    one = dataclasses.replace(PLAIN, depth=1)
    four = dataclasses.replace(one, streams=4, sinkhorn_rounds=4)
    params, _, _ = parts(one)
    start = values(mixing_parameters(jax.random.key(0), WIDTH, 4))
    start = jax.tree.map(lambda leaf: leaf[None], start | {"scale": jnp.zeros(3)})
    (segment,) = params["segments"]
    blocks = segment["blocks"] | {"attention_mixing": start, "ffn_mixing": start}
    mixed = params | {"segments": [segment | {"blocks": blocks}]}
    run = jax.jit(lambda params, config: transformer.apply(
        params, TOKENS_BT, {}, [None], config)[0], static_argnums=1)
    np.testing.assert_allclose(run(mixed, four), run(params, one), rtol=0, atol=1e-5)
    x = jnp.asarray(random(1, 2, WIDTH))
    np.testing.assert_array_equal(hyper_connections.merge(hyper_connections.split(x, 4)), 4 * x)


# --- Experts ---


def dense_oracle(params, x_BTD, choice_NK, config):
    """Every expert on every token, weighed by 0 where it is not the token's choice."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    scores_NE = jax.nn.sigmoid(x_ND @ params["router"])
    picked_NE = np.zeros(scores_NE.shape, np.float32)
    np.put_along_axis(picked_NE, choice_NK, 1.0, axis=1)
    weight_NE = scores_NE * picked_NE
    weight_NE = config.scale * weight_NE / jnp.sum(weight_NE, axis=1, keepdims=True)
    out_EXD = jax.vmap(ffn, in_axes=(0, None))(params["experts"], x_ND)
    out_ND = jnp.einsum("ne,end->nd", weight_NE, out_EXD)
    if config.shared:
        out_ND = out_ND + ffn(params["shared"], x_ND)
    return out_ND.reshape(x_BTD.shape), picked_NE.sum(axis=0).astype(np.int32)


@pytest.mark.parametrize("routed", [experts_here, experts_weighed_first])
@pytest.mark.parametrize(("shape", "experts", "top_k", "bias"), [
    ((1, 1), 4, 2, {}),
    pytest.param((2, 13), 12, 1, {}, marks=pytest.mark.slow),
    pytest.param((1, 16), 4, 4, {}, marks=pytest.mark.slow),
    ((3, 40), 6, 1, {3: 9.0}),
    ((2, 8), 4, 2, {1: -9.0}),
    ((4, 100), 3, 2, {2: 0.2}),
], ids=str)
def test_experts_equal_every_expert_on_every_token(routed, shape, experts, top_k, bias):
    """Weighed where they come back, or, as on TPUs, where they are computed."""
    config = MoEConfig(experts=experts, top_k=top_k, shared=experts % 2, expert_ffn=8, scale=1.5)
    params = values(moe_parameters(jax.random.key(0), 16, config))
    x, cotangent = jnp.asarray(random(*shape, 16)), random(*shape, 16, seed=1)
    bias_E = np.zeros(experts, np.float32)
    bias_E[list(bias)] = list(bias.values())

    scores = 1 / (1 + np.exp(-np.asarray(x.reshape(-1, 16) @ params["router"], np.float64)))
    choice = np.argsort(-(scores + bias_E), axis=1)[:, :top_k]

    def run(layer, picking):
        def loss(params, x):
            out, load = layer(params, x, picking, config)
            return jnp.sum(out * cotangent), (out, load)
        function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(function)(params, x)

    ours = run(functools.partial(moe, routed=routed), bias_E)
    theirs = run(dense_oracle, choice)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
    load = ours[0][1][1]
    assert load.dtype == jnp.int32
    assert int(load.sum()) == choice.size
    for expert, value in bias.items():
        if value == 9.0:
            assert int(load[expert]) == choice.size // top_k
        if value == -9.0:
            assert int(load[expert]) == 0
            assert not ours[1][0]["experts"]["down"][expert].any()


def test_the_bias_picks_but_never_weighs():
    config = MoEConfig(experts=6, top_k=2, shared=0, expert_ffn=8, scale=2.5)
    router, x = jnp.asarray(random(16, 6)), jnp.asarray(random(30, 16, seed=1))
    bias = jnp.array([5.0, 0, 0, 0, 0, 0])
    choice, weight = route(router, x, bias, config)
    assert (choice[:, 0] == 0).all()
    scores = np.take_along_axis(np.asarray(jax.nn.sigmoid(x @ router)), np.asarray(choice), axis=1)
    np.testing.assert_allclose(weight, 2.5 * scores / scores.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(weight.sum(axis=1), 2.5, rtol=1e-5)
    grad = jax.grad(lambda b: jnp.sum(route(router, x, b, config)[1] ** 2))(bias)
    assert not grad.any()


@pytest.mark.parametrize("logit", [0.0, -20.0, -31.0, -46.0, -90.0, -200.0])
def test_weights_of_scores_that_fell_together(logit):
    """They are those of the scores' ratios, and have a gradient, as long as float32 holds them."""
    config = dataclasses.replace(MOE, top_k=2, scale=1.0)
    x = jnp.ones((1, 1))
    offsets = np.linspace(-0.5, 0.5, config.experts, dtype=np.float32)
    router, pull = jnp.asarray(logit + offsets)[None], random(1, 2)
    (weights, back) = jax.vjp(
        lambda router: route(router, x, jnp.zeros(config.experts), config)[1], router)
    (gradient,) = back(jnp.asarray(pull))
    scores = 1 / (1 + np.exp(-np.maximum(np.asarray(router, np.float64)[0, ::-1][:2], -32)))
    share = scores / scores.sum()
    np.testing.assert_allclose(weights[0], share, rtol=1e-4)
    expected = np.zeros(config.experts)
    if logit > -32:
        inner = pull[0] - (pull[0] * share).sum()
        expected[::-1][:2] = share * inner * (1 - scores)
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-3, atol=1e-6)


def test_balancing_moves_every_bias_against_its_load():
    bias = jnp.array([[0.5, 0.0, -1.0, 0.0]])
    load = jnp.array([[4, 0, 2, 2]])
    np.testing.assert_allclose(
        rebalanced(bias, load, 0.01), [[0.49, 0.01, -1.0, 0.0]], rtol=1e-6)
    uneven = jnp.array([[3, 2, 2, 2]])  # the mean is 2.25
    np.testing.assert_allclose(
        rebalanced(bias, uneven, 0.01), [[0.49, 0.01, -0.99, 0.01]], rtol=1e-6)


@pytest.mark.parametrize(("assignments", "experts", "block"), [
    (1, 64, 8), (64, 2, 8), (256, 4, 16), (1000, 4, 32), (4096, 8, 128), (10**6, 8, 128)])
def test_block_size(assignments, experts, block):
    assert block_size(assignments, experts) == block


@pytest.mark.parametrize("experts", [1, 3, 8])
def test_groups_are_a_bijection(experts):
    choice = jnp.asarray(np.random.default_rng(experts).integers(0, experts, (50, 2)), jnp.int32)
    groups = group(choice, experts)
    slots = np.asarray(groups.slot_NK).reshape(-1)
    assert np.unique(slots).size == 100
    np.testing.assert_array_equal(groups.source_P[slots], np.arange(100))
    assert (np.asarray(groups.source_P) == 100).sum() == groups.source_P.size - 100
    block = groups.source_P.size // groups.expert_Q.size
    np.testing.assert_array_equal(groups.expert_Q[slots // block], choice.reshape(-1))
    np.testing.assert_array_equal(groups.count_E, np.bincount(choice.reshape(-1), None, experts))
    assert int(groups.padded_E.sum()) <= groups.source_P.size
    assert (groups.padded_E % block == 0).all()


def test_one_token_takes_no_more_memory_with_more_experts():
    """Nor do many tokens copy more than a matrix at a time."""
    def temporaries(experts, tokens):
        config = MoEConfig(experts=experts, top_k=4, shared=0, expert_ffn=64)
        params = jax.eval_shape(lambda: values(moe_parameters(jax.random.key(0), 64, config)))
        compiled = jax.jit(lambda params, x: moe(params, x, jnp.zeros(experts), config)[0]).lower(
            params, jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(55, 1) <= 1.1 * temporaries(6, 1)
    assert temporaries(55, 512) < 0.5 * 55 * 64 * 64 * 4 + 4 * (4 * 512 + 55 * 8) * 64 * 4


# --- The chain ---


def test_segments_of_the_recipes():
    def chain(name):
        return segments(recipe(name).model)

    assert chain("dense-4b") == (Segment(0, 30, False, False),)
    assert chain("moe-27b") == (Segment(0, 1, False, False), Segment(1, 30, True, False))
    assert chain("engram-27b") == chain("engram-40b") == (
        Segment(0, 1, False, False), Segment(1, 14, True, True), Segment(14, 30, True, True))


@pytest.mark.parametrize("fused", [(0,), (1,), (2,), (0, 1, 2), (0, 2)])
@pytest.mark.parametrize("dense_layers", [0, 1, 2])
def test_segments_cover_every_block_once(fused, dense_layers):
    config = dataclasses.replace(
        PLAIN, engram=engram(*fused), moe=dataclasses.replace(MOE, dense_layers=dense_layers))
    chain = segments(config)
    blocks = [(n, s.experts) for s in chain for n in range(s.start, s.stop)]
    assert blocks == [(n, n >= dense_layers) for n in range(3)]
    assert tuple(s.start for s in chain if s.engram) == fused


def test_models_that_differ_in_their_memory_start_alike(monkeypatch):
    def from_key(key, shape, std):
        """Stands for random numbers: equal where keys, shapes and sizes are equal."""
        return jnp.full(shape, std * (jax.random.key_data(key)[..., -1] % 1000))

    monkeypatch.setattr(parameters, "normal", from_key)
    arms = [dataclasses.replace(PLAIN, moe=MOE, engram=memory, over_encoding=over)
            for memory, over in ((None, None), (engram(0, 2), OverEncodingConfig(**HASH)))]

    def blocks(config):
        params = jax.jit(lambda: transformer.init(config, jax.random.key(3)))()
        found = {segment.start + i: jax.tree.map(lambda leaf: leaf[i], part["blocks"])  # noqa: B023
                 for segment, part in zip(segments(config), params["segments"], strict=True)
                 for i in range(segment.depth)}
        return found, params["embedding"], params["head"], params["final_gain"]

    first = blocks(arms[0])
    assert list(first[0]) == [0, 1, 2]
    for arm in arms[1:]:
        jax.tree.map(np.testing.assert_array_equal, blocks(arm), first)


@pytest.mark.slow
def test_rematerialisation_changes_no_number():
    config = dataclasses.replace(
        PLAIN, depth=2, moe=MoEConfig(experts=3, top_k=1, shared=0, expert_ffn=8, dense_layers=0))

    def run(remat):
        chosen = dataclasses.replace(config, remat=remat)

        def loss(params):
            logits, _ = transformer.apply(
                params, TOKENS_BT, {}, transformer.init_router_bias(config), chosen)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        traced = jax.jit(jax.value_and_grad(loss)).trace(parts(config)[0])
        return traced.lower().compile()(parts(config)[0]), str(traced.jaxpr).count("remat")

    (kept, few), (recomputed, more) = run("none"), run("block")
    assert more > few
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-3, np.abs(a).max()))


def test_what_a_forward_pass_lets_one_see():
    config = VARIANTS["everything"]
    params, _, _ = parts(config)
    rows = rows_of(config, TOKENS_BT, NO_STARTS)
    bias = jax.tree.map(lambda leaf: leaf + random(*leaf.shape),
                        transformer.init_router_bias(config))
    logits, seen = jax.jit(lambda: transformer.apply(params, TOKENS_BT, rows, bias, config))()
    assert differ(np.asarray(logits), network(config)(TOKENS_BT)).any(), "the bias changes choices"

    assert sorted(seen.gates) == [0, 2]
    for gate in seen.gates.values():
        assert gate.shape == (BATCH, TIME, config.streams)
        assert ((gate > 0) & (gate < 1)).all()
    assert [load.shape for load in seen.loads] == [(2, 4), (1, 4)]
    for load in seen.loads:
        assert len(set(load.sum(axis=1).tolist())) == 1, "every block routes every token"


@pytest.mark.slow
def test_one_table_feeds_every_layer():
    """Its rows' gradient is the sum of what each layer's would be."""
    two = dataclasses.replace(PLAIN, engram=engram(0, 2))
    one = changed(two, {"engram.one_table": True})
    assert [site.name for site in sites(one)] == ["layer_0"]
    params, _, _ = parts(one)
    shared = rows_of(one, TOKENS_BT, NO_STARTS)["layer_0"]
    bias = transformer.init_router_bias(one)

    def loss(rows, config):
        return jnp.sum(transformer.apply(params, TOKENS_BT, rows, bias, config)[0] ** 2)

    apart = jax.grad(loss)({"layer_0": shared, "layer_2": shared}, two)
    together = jax.grad(loss)({"layer_0": shared}, one)["layer_0"]
    total = apart["layer_0"] + apart["layer_2"]
    np.testing.assert_allclose(together, total, rtol=0, atol=1e-4 * float(jnp.abs(total).max()))
    assert float(jnp.abs(apart["layer_2"]).max()) > 0.01 * float(jnp.abs(total).max())


@pytest.mark.parametrize("name", ["engram first", "streams"])
def test_bfloat16_gives_float32_logits_near_those_of_float32(name):
    config = VARIANTS[name]
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    exact, rounded = network(config)(TOKENS_BT), network(half)(TOKENS_BT)
    assert exact.dtype == rounded.dtype == np.float32
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1


def test_over_encoding_is_the_mean_of_the_embedding_and_every_head():
    embedded, rows, project = random(2, 3, 8), random(2, 3, 4, 2, seed=1), random(4, 2, 8, seed=2)
    expected = (embedded + sum(rows[:, :, h] @ project[h] for h in range(4))) / 5
    out = encode({"project": jnp.asarray(project)}, jnp.asarray(embedded), jnp.asarray(rows))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_rms_norm():
    x, gain = random(2, 3, 8), random(8, seed=1)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), None, 0.1), expected, rtol=1e-5)
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x), jnp.asarray(gain), 0.1), expected * gain, rtol=1e-5)
    assert rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(gain), 0.1).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", RECIPES)
def test_contract_of_every_recipe(name):
    """Float32 parameters, and float32 logits of every token, at the run's own length."""
    run = recipe(name)
    config, batch, time = run.model, 2, run.data.sequence_length
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    rows = {site.name: jax.ShapeDtypeStruct(
        (batch, time, site.hash_config.total_heads, site.dim), jnp.float32)
        for site in sites(config)}
    bias = jax.eval_shape(lambda: transformer.init_router_bias(config))
    logits, seen = jax.eval_shape(
        lambda *arguments: transformer.apply(*arguments, config), params, tokens, rows, bias)
    assert (logits.shape, logits.dtype) == ((batch, time, config.vocab_size), jnp.float32)
    assert [gate.shape for gate in seen.gates.values()] == [(batch, time, config.streams)] * len(
        config.engram.layers if config.engram else ())
    assert [load.shape for load in seen.loads if load is not None] == [
        (s.depth, config.moe.experts) for s in segments(config) if s.experts]
