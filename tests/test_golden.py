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

from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash, reach_from_dead

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
    token_map = CompressedVocabulary.from_lookup(np.concatenate([
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
