"""Reference numbers: every file of a known form in $ENGRAM_GOLDEN (default: golden/ beside this).

A new file is picked up by its name. Kinds without a file are skipped; a folder that does not
exist fails. The DeepSeek-V3 tokenizer is $ENGRAM_TOKENIZER, or else shared/tokenizers beside the
checkout; what needs it is skipped where it is absent.
"""

import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from engram_jax.config import AttentionConfig, EngramConfig, MoEConfig, YarnConfig
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash, reach_from_dead
from engram_jax.model.attention import attention, cached_attention, frequencies, latents
from engram_jax.model.engram import fuse, init_engram
from engram_jax.model.hyper_connections import connect, mixing
from engram_jax.model.moe import moe
from engram_jax.tables.layout import TableLayout

pytestmark = pytest.mark.usefixtures("compilations")

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = pathlib.Path(os.environ.get("ENGRAM_GOLDEN") or HERE / "golden")
TOKENIZER = pathlib.Path(os.environ.get("ENGRAM_TOKENIZER") or (
    HERE.parent.parent / "shared/tokenizers/deepseek_v3.json"))


def golden_files(pattern):
    """The golden files of one kind, as parameters of a test."""
    return [pytest.param(path, id=path.name) for path in sorted(GOLDEN.glob(pattern))]


def test_the_golden_folder_exists():
    assert GOLDEN.is_dir(), f"ENGRAM_GOLDEN = {GOLDEN}: no such folder"


# --- Tokens to row ids ---


@functools.cache
def _tokenizer():
    return tokenizers.Tokenizer.from_file(str(TOKENIZER))


@functools.cache
def _vocabulary():
    return CompressedVocabulary.from_tokenizer(_tokenizer())


@pytest.fixture
def vocabulary():
    if not TOKENIZER.is_file():
        pytest.skip(f"no tokenizer at {TOKENIZER}; set ENGRAM_TOKENIZER")
    return _vocabulary()


def _digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, "<i8").tobytes()).hexdigest()


def _both(hashing, name, *arguments, **keywords):
    """`row_ids` or `table_ids` by NumPy; the jitted one must give the same, without x64."""
    assert not jax.config.jax_enable_x64
    expected = getattr(hashing, f"{name}_numpy")(*arguments, **keywords)
    on_device = jax.tree.map(jnp.asarray, (arguments[0], *arguments[2:]))
    jitted = jax.jit(lambda ids, *rest: getattr(hashing, name)(ids, arguments[1], *rest, **keywords)
                     )(*on_device)
    np.testing.assert_array_equal(jitted, expected)
    return expected


@pytest.mark.parametrize("path", golden_files("*_compression.json"))
def test_compressed_vocabulary(path, vocabulary):
    golden = json.loads(path.read_text())
    if hashlib.sha256(TOKENIZER.read_bytes()).hexdigest() != golden["tokenizer_sha256"]:
        pytest.skip(f"{TOKENIZER} is not the tokenizer of {path.name}")
    lookup_V = vocabulary.lookup
    assert lookup_V.size == golden["vocab"]
    assert vocabulary.size == golden["compressed"]
    assert 1 - vocabulary.size / lookup_V.size == pytest.approx(golden["reduction"])
    assert vocabulary.digest == golden["lookup_int64_le_sha256"]
    for raw, canonical in golden["lookup_every_997th"]:
        assert lookup_V[raw] == canonical
    largest = sorted(np.bincount(lookup_V).tolist(), reverse=True)
    classes = golden["largest_classes"]
    assert largest[:len(classes)] == classes


def _hash_groups(path):
    """The settings and the cases of a file; a list of cases carries settings in each."""
    golden = json.loads(path.read_text())
    return [(golden, golden["cases"])] if isinstance(golden, dict) else [
        (case, [case]) for case in golden]


def _hashing_of(group):
    pad_id = group["pad_id"]  # raw; the same number in DeepSeek-V3's canonical ids
    if TOKENIZER.is_file() and _vocabulary().size == group["compressed_vocab"]:
        pad_id = int(_vocabulary().lookup[pad_id])
    return NgramHash(
        rows_per_head=tuple(group["rows_per_head_at_least"]), heads=group["heads"],
        layers=tuple(sorted(map(int, group["multipliers"]))), seed=group["seed"],
        vocab_size=group["compressed_vocab"], pad_id=pad_id)


@pytest.mark.parametrize("path", golden_files("ngram_hash_*.json"))
def test_ngram_hash(path):
    groups = _hash_groups(path)
    assert groups
    for group, cases in groups:
        hashing = _hashing_of(group)
        assert hashing.max_order == group["max_ngram"]
        assert cases
        for layer in hashing.layers:
            assert list(hashing.multipliers[layer]) == group["multipliers"][str(layer)]
            assert [list(p) for p in hashing.primes[layer]] == group["primes"][str(layer)]
            for case in cases:
                ids_BT = np.atleast_2d(case["compressed"])
                rows = _both(hashing, "row_ids", ids_BT, layer)
                expected = np.array(case["row_ids"][str(layer)]).reshape(rows.shape)
                np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("path", golden_files("ngram_hash_*.json"))
def test_ngram_hash_tokens(path, vocabulary):
    for group, cases in _hash_groups(path):
        if vocabulary.size != group["compressed_vocab"]:
            pytest.skip(f"{TOKENIZER} is not the tokenizer of {path.name}")
        for case in cases:
            raw = np.array(case["token_ids"])
            np.testing.assert_array_equal(vocabulary.canonical(raw), case["compressed"])
            if "text" in case:
                encoded = _tokenizer().encode(case["text"], add_special_tokens=False)
                assert encoded.ids == case["token_ids"]


def _v41(path):
    golden = json.loads(path.read_text())
    config = golden["config"]
    return golden, NgramHash(
        rows_per_head=(config["engram_vocab_size"],) * (config["engram_max_ngram_size"] - 1),
        heads=config["engram_n_heads"], layers=tuple(config["engram_layer_ids"]),
        vocab_size=config["engram_compressed_vocab_size"],
        pad_id=golden["token_map_recipe"]["pad_compressed"])


def _v41_rows(hashing, canonical_T, history=None, **keywords):
    """Rows of the layers' tables, [T, layers, H], of one sequence."""
    ids_BT = np.array([canonical_T])
    return np.stack([_both(hashing, "table_ids", ids_BT, layer, history, **keywords)[0]
                     for layer in hashing.layers], axis=1)


@pytest.mark.parametrize("path", golden_files("deepseek_v41_hash*.json"))
def test_v41_constants(path):
    golden, hashing = _v41(path)
    layers, digests = hashing.layers, golden["digests_int64"]
    for name, values in (("primes", hashing.primes), ("multipliers", hashing.multipliers),
                         ("offsets", hashing.offsets)):
        array = np.array([values[layer] for layer in layers])
        assert array.tolist() == golden[name]
        shape = ",".join(map(str, array.shape))
        assert _digest(array) == digests[f"{name}[{shape}]"]
    assert [hashing.table_rows[layer] for layer in layers] == (
        golden["config"]["engram_num_embeddings"])


@pytest.mark.parametrize("path", golden_files("deepseek_v41_hash*.json"))
def test_v41_token_map(path, vocabulary):
    golden, _ = _v41(path)
    recipe = golden["token_map_recipe"]
    distinct = recipe["distinct_in_first_128000"]
    added = recipe["compressed"] - distinct
    token_map = CompressedVocabulary(np.concatenate([
        vocabulary.lookup[:recipe["len"] - added], distinct + np.arange(added)]))
    assert (vocabulary.lookup.size, vocabulary.size) == (
        recipe["v3_total"]["len"], recipe["v3_total"]["compressed"])
    assert token_map.size == recipe["compressed"] == golden["config"][
        "engram_compressed_vocab_size"]
    assert token_map.lookup[:4].tolist() == recipe["token_map[0:4]"]
    assert token_map.lookup[15] == recipe["token_map[15]"]
    assert token_map.lookup[golden["config"]["engram_pad_token_id"]] == recipe["pad_compressed"]
    assert token_map.digest == golden["digests_int64"][f"token_map[{recipe['len']}]"]
    for fixture in [*golden["fixtures"], golden["fixture_long"]]:
        if "compressed" in fixture:
            raw = np.array(fixture["input_ids"])
            assert token_map.canonical(raw).tolist() == fixture["compressed"]


@pytest.mark.parametrize("path", golden_files("deepseek_v41_hash*.json"))
def test_v41_fixtures(path):
    golden, hashing = _v41(path)
    assert golden["fixtures"]
    for fixture in golden["fixtures"]:
        seen = np.array(fixture["history_newest_first"])
        rows = _v41_rows(hashing, seen[:, 0], seen[:1, :0:-1])
        expected = next(v for k, v in fixture.items() if k.startswith("hash_ids"))
        np.testing.assert_array_equal(rows, expected)
        for name, digest in fixture["sha256"].items():
            part = name.partition("[")[0].removeprefix("layer")
            chosen = rows if part == "all" else rows[:, hashing.layers.index(int(part))]
            assert _digest(chosen) == digest, name


@pytest.mark.parametrize("path", golden_files("deepseek_v41_hash*.json"))
def test_v41_long_text_with_and_without_dead_positions(path):
    golden, hashing = _v41(path)
    fixture, dead = golden["fixture_long"], golden["fixture_dead_positions"]
    canonical_T = fixture["compressed"]
    rows = _v41_rows(hashing, canonical_T)
    assert len(rows) == fixture["T"]
    assert _digest(rows) == fixture["sha256_hash_ids_int64[T,2,24]"]
    for at, layer in enumerate(hashing.layers):
        assert rows[-1, at].tolist() == fixture[f"last_row_layer{layer}"]

    dead_BT = np.isin(np.arange(len(rows)), dead["dead_positions"])[None]
    masked = _v41_rows(hashing, canonical_T, reach_BT=reach_from_dead(dead_BT))
    assert masked[8, 0].tolist() == dead["row8_layer1"]
    assert masked[5, 0].tolist() == dead["row5_layer1"]
    differ = np.flatnonzero((masked != rows).any(axis=(1, 2)))
    assert differ.tolist() == dead["rows_that_differ_from_unmasked"]
    assert _digest(masked) == dead["sha256_hash_ids_int64[T,2,24]"]


# --- The module and the backbone ---

CLOSE = 2e-5  # of the largest output


def _arrays(path):
    """(meta, arrays, weights): weights without their "w.", linear ones as [in, out]."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    weights = {name.removeprefix("w."): arrays.pop(name)
               for name in list(arrays) if name.startswith("w.")}
    return meta, arrays, weights


def _check_output(function, expected, *arguments):
    """`function` gives the golden output, jitted and eagerly."""
    arguments = jax.tree.map(jnp.asarray, arguments)
    for way in (function, jax.jit(function)):
        output = way(*arguments)
        assert output.shape == expected.shape
        np.testing.assert_allclose(output, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


def _eps(value):
    """A number, or a text that ends in "=number"."""
    return float(str(value).rpartition("=")[2])


def _module_config(meta, weights):
    kernel = meta["kernel"] if "short_conv.conv.weight" in weights else 0
    return EngramConfig(
        layers=(0,), rows_per_head=tuple(meta["rows"]),
        max_order=meta["max_ngram"], heads=meta["heads"],
        head_dim=meta["embed_per_order"] // meta["heads"], kernel=kernel,
        dilation=meta["dilation"] if kernel else 0, bias=meta["bias"],
        signed_root="sqrt" in meta["gate"], norm_eps=_eps(meta["qk_norm_eps"]),
        conv_norm_eps=_eps(meta["conv_norm_eps"]))


def _module_params(weights, config, streams):
    projections = [f"key_projs.{stream}" for stream in range(streams)] + ["value_proj"]

    def stacked(name):
        return np.stack([weights[name.format(stream)] for stream in range(streams)])

    params = {"project": np.stack([weights[f"{name}.weight"].T for name in projections]),
              "key_gain": stacked("norm1.{}.weight"), "query_gain": stacked("norm2.{}.weight")}
    if config.bias:
        params["bias"] = np.stack([weights[f"{name}.bias"] for name in projections])
    if config.kernel:
        taps_LC = weights["short_conv.conv.weight"][:, 0].T
        params["conv"] = taps_LC.reshape(config.kernel, streams, -1)
        params["conv_gain"] = stacked("short_conv.norms.{}.weight")
    return params


@pytest.mark.parametrize("path", golden_files("module_*.npz"))
def test_module(path):
    meta, arrays, weights = _arrays(path)
    config, streams = _module_config(meta, weights), meta["hc_mult"]
    params = _module_params(weights, config, streams)
    template = jax.eval_shape(
        lambda: init_engram(jax.random.key(0), meta["hidden"], streams, config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, template)

    batch, time, heads = arrays["row_ids"].shape
    assert heads == config.total_heads
    assert config.max_order == meta["max_ngram"]
    table_ids = arrays["row_ids"] + weights["multi_head_embedding.offsets"]
    table = weights["multi_head_embedding.embedding.weight"]
    layout = TableLayout(rows=table.shape[0], dim=table.shape[1], shards=7)
    table_SRD = layout.put(jnp.zeros(layout.shape), jnp.arange(layout.rows), jnp.asarray(table))
    rows_BTHC = layout.gather(table_SRD, jnp.asarray(table_ids, jnp.int32))
    np.testing.assert_array_equal(rows_BTHC, table[table_ids])

    shape = (batch, time, streams, meta["hidden"])
    _check_output(
        lambda *arguments: fuse(*arguments, config).delta_BTMD, arrays["output"].reshape(shape),
        params, arrays["hidden"].reshape(shape), rows_BTHC)


@pytest.mark.parametrize("path", golden_files("module_*.npz"))
def test_module_primes(path):
    """The rows of the heads are those of one layer of a hash, laid end to end in the table."""
    meta, arrays, weights = _arrays(path)
    hashing = NgramHash(rows_per_head=tuple(meta["rows"]), heads=meta["heads"], layers=(0, 1, 2, 3),
                        vocab_size=int(arrays["compressed"].max()) + 1, pad_id=0)
    layer = next(layer for layer in hashing.layers
                 if np.array_equal(hashing.primes[layer], arrays["primes"]))
    np.testing.assert_array_equal(
        weights["multi_head_embedding.offsets"], hashing.offsets[layer])
    assert len(weights["multi_head_embedding.embedding.weight"]) == hashing.table_rows[layer]
    assert (arrays["row_ids"] < arrays["primes"].reshape(-1)).all()


def _attention_of(meta, weights):
    """Our config and parameters of a DeepSeek attention."""
    config = AttentionConfig(**{name: meta[name] for name in (
        "heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "rope_theta")},
        yarn=YarnConfig(**meta["yarn"]) if "yarn" in meta else None)
    return config, {
        "query": weights["q_proj.weight"].T,
        "latent": weights["kv_a_proj_with_mqa.weight"].T,
        "latent_gain": weights["kv_a_layernorm.weight"],
        "expand": weights["kv_b_proj.weight"].T,
        "output": weights["o_proj.weight"].T,
    }


@pytest.mark.parametrize("path", golden_files("backbone_mla_*.npz")
                         + golden_files("backbone_yarn_*.npz"))
def test_attention(path):
    meta, arrays, weights = _arrays(path)
    config, params = _attention_of(meta, weights)
    if "inv_freq" in meta:
        np.testing.assert_allclose(frequencies(config), meta["inv_freq"], rtol=1e-6)
    _check_output(lambda *arguments: attention(*arguments, config, _eps(meta["kv_norm_eps"])),
                  arrays["output"], params, arrays["input"])


@pytest.mark.parametrize("path", golden_files("backbone_yarn_*.npz"))
def test_decoding_beyond_the_original_length(path):
    """Token by token from the compressed cache, every position of the released module's output."""
    meta, arrays, weights = _arrays(path)
    config, params = _attention_of(meta, weights)
    eps, x_BTD = _eps(meta["kv_norm_eps"]), jnp.asarray(arrays["input"])
    batch, time, _ = x_BTD.shape
    assert time > config.yarn.original_length
    positions_BT = jnp.tile(jnp.arange(time, dtype=jnp.int32)[None], (batch, 1))
    cache = latents(params, x_BTD, positions_BT, config, eps)
    decode = jax.jit(lambda x, at: cached_attention(
        params, x, *cache, at, jnp.zeros_like(at), config))
    decoded = jnp.concatenate([decode(x_BTD[:, t:t + 1], positions_BT[:, t:t + 1])
                               for t in range(time)], axis=1)
    largest = np.abs(arrays["output"]).max()
    np.testing.assert_allclose(decoded, arrays["output"], atol=2e-5 * largest)


@pytest.mark.parametrize("path", golden_files("backbone_moe_*.npz"))
def test_experts(path):
    meta, arrays, weights = _arrays(path)
    config = MoEConfig(**{name: meta[name] for name in (
        "experts", "top_k", "shared", "expert_ffn", "scale")})
    gate_EDF, up_EDF = np.split(weights["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    params = {
        "router": weights["gate.weight"].T,
        "experts": {"gate": gate_EDF, "up": up_EDF,
                    "down": weights["experts.down_proj"].swapaxes(1, 2)},
    }
    if config.shared:
        params["shared"] = {part: weights[f"shared_experts.{part}_proj.weight"].T
                            for part in ("gate", "up", "down")}
    bias_E = weights["gate.e_score_correction_bias"]
    _check_output(lambda *arguments: moe(*arguments, config)[0], arrays["output"],
                  params, arrays["input"], bias_E)


@pytest.mark.parametrize("path", golden_files("mhc_*.npz"))
def test_hyper_connections(path):
    """The reference's mixing of streams, comb[j, k], is our H_res[k, j]."""
    meta, arrays, weights = _arrays(path)
    streams = meta["streams"]
    order = np.arange(2 * streams + streams**2)
    order[2 * streams:] = order[2 * streams:].reshape(streams, streams).T.reshape(-1)
    params = {"project": weights["fn"][order].T, "bias": weights["base"][order],
              "scale": weights["scale"]}
    rounds, eps = meta["rounds"], _eps(meta["rms_norm_eps"])

    def mixed(params, x_BTMD):
        return mixing(params, x_BTMD, rounds, eps)

    x_BTMD = arrays["input"]
    _check_output(lambda *a: mixed(*a).post_BTM, arrays["post"], params, x_BTMD)
    _check_output(lambda *a: mixed(*a).residual_BTMM.swapaxes(2, 3), arrays["comb"],
                  params, x_BTMD)
    _check_output(
        lambda params, x_BTMD: connect(
            params, x_BTMD, lambda h_BTD: (h_BTD @ weights["sub_layer"].T, None), rounds, eps)[0],
        arrays["output"], params, x_BTMD)
