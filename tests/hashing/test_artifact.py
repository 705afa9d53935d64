"""What a run hashes with as a file: the same ids again, and every field refused that is wrong."""

import base64
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.config import EngramConfig
from engram_jax.errors import UserError
from engram_jax.hashing import artifact
from engram_jax.hashing.addressing import address
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.host import HostHash
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import BEFORE, TokenHash
from engram_jax.hashing.variants import HashNumbers

CONFIG = EngramConfig(layers=(1, 4), rows_per_head=(50, 70), heads=2, head_dim=4)
VOCABULARY = CompressedVocabulary(np.arange(60) // 2)
ADDRESSING = address(CONFIG, VOCABULARY, pad_id=3)
KEPT = HashArtifact.of(ADDRESSING)
TOKENS_BT = np.random.default_rng(0).integers(0, 60, (3, 11)).astype(np.int32)

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def test_a_file_gives_the_same_ids_and_fingerprints_and_derives_nothing(tmp_path, monkeypatch):
    KEPT.write(tmp_path / "hash.json")
    fingerprints, row_ids = ADDRESSING.fingerprints(), ADDRESSING.ids(jnp.asarray(TOKENS_BT))
    monkeypatch.setattr("engram_jax.hashing.variants.multipliers", None)
    kept = artifact.read_artifact(tmp_path / "hash.json")
    assert kept.digest == KEPT.digest
    again = kept.addressing(CONFIG)
    assert again.fingerprints() == fingerprints
    for name, ids in row_ids.items():
        np.testing.assert_array_equal(again.ids(jnp.asarray(TOKENS_BT))[name], ids)
        np.testing.assert_array_equal(HostHash(again)(TOKENS_BT)[name], ids)


def test_a_hash_of_another_model_is_refused():
    for field, value, what in (("layers", (1, 5), "layer_4"), ("hash_seed", 3, "layer_1"),
                               ("rows_per_head", (50, 90), "layer_1")):
        other = dataclasses.replace(CONFIG, **{field: value})
        with pytest.raises(UserError, match=f"hash.json: memory '{what}' = .*; the model has"):
            KEPT.addressing(other)


def changed(change, digest=True):
    """The text of the file after `change` of its values."""
    values = json.loads(KEPT.to_json())
    change(values)
    if digest:
        values["digest"] = artifact._digest({"memories": values.get("memories")})
    return json.dumps(values)


def entry(**fields):
    return lambda values: values["memories"][0].update(fields)


MULTIPLIERS, PRIMES = [[3, 5, 7], [9, 11, 13]], [[[53, 59], [71, 73]], [[61, 67], [79, 83]]]


@pytest.mark.parametrize(("change", "line"), [
    (lambda v: v.update(format="tables"), "format = 'tables': must be 'engram_jax hash'"),
    (lambda v: v.update(version=2), "version = 2: of the format; this reads 1"),
    (lambda v: v.update(memories=3), r"memories = \['memories'\]: must be a list"),
    (entry(variant="murmur"), r"memories\[0\].variant = 'murmur': must be one of deepseek, qwen"),
    (entry(heads=2.0), r"memories\[0\].heads = 2.0: must be a whole number"),
    (entry(heads=3), r"primes = .*: must be 3 heads for each of 2 orders"),
    (entry(layers="14"), r"layers = '14': must be a list of whole numbers"),
    (entry(end_id="x"), "end_id = 'x': must be a raw token id or null"),
    (entry(end_id=60), r"end_id = 60: must be a raw token id, in 0..59"),
    (entry(dead_ids=[-1]), r"dead_ids = -1: must be a raw token id, in 0..59"),
    (entry(pad_id=30), r"pad_id = 30: must be a canonical id, in 0..29"),
    (entry(vocab_size=31), "token_map = 30: different ids must be 31"),
    (entry(multipliers=[[3, 5, 7], [9, 12, 13]]), "multipliers = 12: must be odd"),
    (entry(multipliers=[[3, 5, 7], [9, 11, 2**63 + 1]]), r"must be odd, in 1..2\*\*63 - 1"),
    (entry(multipliers=[[3, 5, 7], [9, 11, 2**60 + 1]]), "times an id of up to 29 overflows"),
    (entry(multipliers=[[3, 5, 7]]), "multipliers = .*: must be 3 for each of 2 layers"),
    (entry(multipliers=[[3, 5, 7], 9]), "multipliers = 9: must be lists, 1 deep"),
    (entry(multipliers=[[3, 5, 7], [9, 11, "x"]]), "multipliers = 'x': must be whole numbers"),
    (entry(primes=[[[53, 59], [71, 75]], PRIMES[1]]), "primes = 75: must be a prime number"),
    (entry(primes=[[[53, 59], [71, 97]], PRIMES[1]]), r"rows = .*: the primes sum to \[280, 290\]"),
    (entry(rows=[1, 2]), r"rows = \[1, 2\]: the primes sum to"),
    (entry(sites={"layer_1": 2}), "sites = .*: must give each site one of the layers"),
    (entry(sites={"layer_1": True}), "sites = .*: must give each site one of the layers"),
    (lambda v: v["memories"].append(v["memories"][0]),
     r"memories\[1\].sites = 'layer_1': is a site of another memory, too"),
    (entry(token_map={"length": 60, "base64": "%"}), "token_map.base64: is no base64 of int32"),
    (entry(token_map={"length": 60, "base64": "AAA="}), "token_map.base64: is no base64 of int32"),
    (entry(token_map={"length": 61, "base64": base64.b64encode(
        VOCABULARY.lookup.astype("<i4")).decode()}), "token_map.length = 61: the map has 60 ids"),
    (entry(token_map={"length": 2, "base64": base64.b64encode(
        np.array([0, 7], "<i4")).decode()}), "has 2 different ids, which must be 0..1"),
    (lambda v: v["memories"][0].pop("seed"), "fields = .*: must be "),
    (lambda v: v.update(memories=[3]), "fields = 3: must be"),
])
def test_a_field_that_is_wrong_is_one_line(change, line, tmp_path):
    (tmp_path / "hash.json").write_text(changed(change))
    with pytest.raises(UserError, match=line) as caught:
        artifact.read_artifact(tmp_path / "hash.json")
    assert str(caught.value).startswith(f"{tmp_path / 'hash.json'}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_was_altered_or_is_none_is_refused():
    with pytest.raises(UserError, match=r"digest = .*: is not that of the contents"):
        artifact.parse(changed(entry(seed=1), digest=False))
    for data in (b"\x80\x04", "{", "[" * 100_000):
        with pytest.raises(UserError, match="is not JSON"):
            artifact.parse(data)
    with pytest.raises(UserError, match="format = None: must be"):
        artifact.parse("[]")


# --- The variants ---


@st.composite
def qwen_hashes(draw):
    """Qwen's hash with any multipliers, so that products wrap round and are negative."""
    orders, heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), (2,)
    made = NgramHash(rows_per_head=(draw(st.integers(2, 10**8)),) * orders, heads=heads,
                     layers=layers, vocab_size=draw(st.integers(2, 2**31 - 1)), pad_id=1,
                     variant="qwen")
    odd = st.integers(0, 2**62 - 1).map(lambda half: 2 * half + 1)
    numbers = HashNumbers(multipliers=(tuple(draw(odd) for _ in range(orders + 1)),),
                          primes=(made.primes[2],))
    return dataclasses.replace(made, numbers=numbers)


def signed(word):
    return (word + 2**63) % 2**64 - 2**63


@few
@given(qwen_hashes(), st.integers(0, 2**32))
def test_products_wrap_as_signed_numbers_and_the_remainder_is_the_floors(hashing, seed):
    ids_BT = np.random.default_rng(seed).integers(0, hashing.vocab_size, (2, 5)).astype(np.int32)
    expected = np.zeros((2, 5, len(hashing.primes[2]), hashing.heads), np.int64)
    for b, t in np.ndindex(2, 5):
        mix = 0
        for back, multiplier in enumerate(hashing.multipliers[2]):
            mix ^= signed((int(ids_BT[b, t - back]) if t >= back else 1) * multiplier)
            for head in range(hashing.heads if back else 0):
                expected[b, t, back - 1, head] = mix % hashing.primes[2][back - 1][head]
    expected = expected.reshape(2, 5, -1)
    np.testing.assert_array_equal(hashing.row_ids_numpy(ids_BT, 2), expected)
    np.testing.assert_array_equal(hashing.row_ids(ids_BT, 2), expected)


def test_a_layers_multipliers_depend_on_its_number_or_on_how_many_there_are_before_it():
    for variant, same in (("deepseek", False), ("qwen", True)):
        one, other = (NgramHash(rows_per_head=(50,), heads=1, layers=(layer,), vocab_size=9,
                                pad_id=0, variant=variant).multipliers[layer] for layer in (1, 2))
        assert (one == other) == same


@pytest.mark.parametrize("rules", [{}, {"end_id": 5}, {"dead_ids": (7, 8)},
                                   {"end_id": 5, "dead_ids": (7,)}])
def test_rules_of_documents_and_dead_tokens_agree_under_jit_whole_and_in_chunks(rules):
    memory = TokenHash(hashing=ADDRESSING.hashes["layer_4"], vocabulary=VOCABULARY, **rules)
    tokens_BT = np.random.default_rng(1).integers(4, 10, (4, 30)).astype(np.int32)
    whole = memory.table_ids_numpy(tokens_BT, 4)
    jitted = jax.jit(lambda tokens, history: memory.table_ids(tokens, 4, history))
    np.testing.assert_array_equal(jitted(tokens_BT, None), whole)
    padded = np.pad(tokens_BT, ((0, 0), (2, 0)), constant_values=BEFORE)
    for at in range(30):
        chunk, history = tokens_BT[:, at:at + 1], padded[:, at:at + 2]
        for ids in (memory.table_ids_numpy(chunk, 4, history), jitted(chunk, history)):
            np.testing.assert_array_equal(ids, whole[:, at:at + 1])


def test_no_prime_of_qwens_first_layer_comes_up_in_its_second():
    """The released model has one such layer; transformers goes on behind it."""
    hashing = NgramHash(rows_per_head=(50, 50), heads=2, layers=(1, 4), vocab_size=30, pad_id=3,
                        variant="qwen")
    assert hashing.primes == {1: ((53, 59), (61, 67)), 4: ((71, 73), (79, 83))}


def test_what_is_behind_the_end_of_a_document_counts_as_pad():
    """Token by token: what each may see, written out."""
    memory = TokenHash(hashing=ADDRESSING.hashes["layer_1"], vocabulary=VOCABULARY, end_id=9)
    seen = memory.reach_numpy(np.array([[9, 4, 9, 6, 7, 9, 9, 8]]))
    np.testing.assert_array_equal(seen, [[2, 1, 2, 3, 1, 1]])
    dead = TokenHash(hashing=ADDRESSING.hashes["layer_1"], vocabulary=VOCABULARY, dead_ids=(9,))
    seen = dead.reach_numpy(np.array([[4, 9, 6, 9, 7, 8]]))
    np.testing.assert_array_equal(seen, [[1, 0, 1, 2]])
