"""The hash on the host: the ids of the reference."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax import recipes
from engram_jax.config import HashConfig, OverEncodingConfig
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import Addressing, Site, address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.host import HostHash
from engram_jax.hashing.ngrams import NgramHash, reach_from_dead
from engram_jax.hashing.token_hash import BEFORE

pytestmark = pytest.mark.usefixtures("compilations")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "deepseek_v41_hash.json").read_text())
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def addressing(compress=True, over=True, vocabulary=None, **fields):
    """Two Engram layers and, if `over`, an OverEncoding input that is hashed otherwise."""
    model = recipes.tiny().model
    engram = dataclasses.replace(model.engram, **{
        "layers": (0, 1), "rows_per_head": (50, 700, 60), "max_order": 4, "heads": 3,
        "compress": compress, **fields})
    other = OverEncodingConfig(rows_per_head=(90,), max_order=2, heads=2, compress=False)
    model = dataclasses.replace(model, engram=engram, over_encoding=other if over else None,
                                vocab_size=300)
    if vocabulary is None:
        vocabulary = CompressedVocabulary(np.arange(300) // 2)
    return address(model, vocabulary, pad_id=7)


@few
@given(st.data())
def test_ids_are_those_of_the_addressing(data):
    found = addressing(data.draw(st.booleans()), data.draw(st.booleans()),
                       hash_seed=data.draw(st.integers(0, 5)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    batch, time = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([0, 1, 7]))
    tokens_BT = random.integers(0, 300, (batch, time)).astype(data.draw(
        st.sampled_from([np.int32, np.int64, np.uint16])))
    positions_BT = np.arange(time)[None] - random.integers(0, 3, (batch, 1))
    positions_BT = np.maximum(positions_BT, 0).astype(np.int32)
    use = data.draw(st.booleans())
    expected = found.ids(jnp.asarray(tokens_BT, jnp.int32),
                         jnp.asarray(positions_BT) if use else None)
    ids = HostHash(found)(tokens_BT, reach_BT=positions_BT + 1 if use else None)
    assert list(ids) == list(expected) == [site.name for site in found.sites]
    for name, ids_BTH in ids.items():
        assert ids_BTH.dtype == np.int64
        np.testing.assert_array_equal(ids_BTH, expected[name])


@few
@given(batch=st.integers(1, 3), before=st.integers(0, 5), time=st.integers(1, 5),
       seed=st.integers(0, 99))
def test_a_history_continues_the_text(batch, before, time, seed):
    """Chunks give the ids of the whole; before the start of the text there is no token."""
    hashing = HostHash(addressing())
    text = np.random.default_rng(seed).integers(0, 300, (batch, before + time)).astype(np.int32)
    history = np.full((batch, hashing.history_length), BEFORE, np.int32)
    kept = min(before, hashing.history_length)
    history[:, hashing.history_length - kept:] = text[:, before - kept:before]
    whole, chunk = hashing(text), hashing(text[:, before:], history)
    for name in hashing.names:
        np.testing.assert_array_equal(chunk[name], whole[name][:, before:])


def golden_addressing():
    config = GOLDEN["config"]
    vocabulary = CompressedVocabulary.identity(config["engram_compressed_vocab_size"])
    hashing = NgramHash(rows_per_head=(16_000_000,) * 3, heads=8, layers=(1, 14),
                        vocab_size=vocabulary.size, pad_id=2)
    settings = HashConfig(rows_per_head=hashing.rows_per_head, max_order=4, heads=8)
    sites = tuple(Site(f"layer_{layer}", layer, hashing.layers, settings,
                       hashing.table_rows[layer], 256)
                  for layer in hashing.layers)
    names = [site.name for site in sites]
    return Addressing(sites, dict.fromkeys(names, hashing), dict.fromkeys(names, vocabulary))


def test_the_hash_of_deepseek_v41():
    """Its long text, with and without dead positions."""
    found = HostHash(golden_addressing())
    fixture, dead = GOLDEN["fixture_long"], GOLDEN["fixture_dead_positions"]
    tokens_BT = np.array([fixture["compressed"]], np.int32)
    assert digest(found(tokens_BT)) == fixture["sha256_hash_ids_int64[T,2,24]"]
    dead_BT = np.isin(np.arange(tokens_BT.size), dead["dead_positions"])[None]
    masked = found(tokens_BT, reach_BT=np.asarray(reach_from_dead(dead_BT)))
    assert digest(masked) == dead["sha256_hash_ids_int64[T,2,24]"]


def digest(ids):
    both = np.stack([ids["layer_1"][0], ids["layer_14"][0]], axis=1)
    return hashlib.sha256(np.ascontiguousarray(both, "<i8").tobytes()).hexdigest()


@pytest.mark.parametrize(("tokens", "history", "line"), [
    ([[1, 300]], None, "token id = 300: must be in 0..299"),
    ([[1, -1]], None, "token id = -1: must be in 0..299"),
    ([[1, 2]], [[-2, 0, 0]], "history = -2: must be in -1..299"),
    ([[1, 2]], [[0, 0, 300]], "history = 300: must be in -1..299"),
    ([[1, 2]], [[0, 0]], r"history = 'int32 \(1, 2\)': must be whole numbers \(1, 3\)"),
    ([1, 2], None, r"tokens = 'int32 \(2,\)': must be whole numbers \[B, T\]"),
    ([[0.5]], None, "tokens = 'float64")])
def test_bad_tokens_are_refused(tokens, history, line):
    history = None if history is None else np.array(history, np.int32)
    tokens = np.array(tokens)
    if tokens.dtype.kind == "i":
        tokens = tokens.astype(np.int32)
    with pytest.raises(UserError, match=line):
        HostHash(addressing())(tokens, history)
    with pytest.raises(UserError, match="reach = "):
        HostHash(addressing())(np.zeros((1, 2), np.int32), reach_BT=np.zeros((1, 3), np.int32))
