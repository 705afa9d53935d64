"""Tokens to row ids: the jitted uint32 hash, its NumPy twin, and the compressed vocabulary."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from engram_jax.benchmarks.hashing import hash_benchmark
from engram_jax.errors import UserError
from engram_jax.hashing import ngrams
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash, reach_from_dead, reach_from_documents
from engram_jax.hashing.variants import is_prime

pytestmark = pytest.mark.usefixtures("compilations")

SMALL = NgramHash(rows_per_head=(50, 70), heads=2, layers=(1, 4), vocab_size=300, pad_id=7)
IDS_BT = np.random.default_rng(0).integers(0, 300, (3, 11)).astype(np.int32)

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@st.composite
def hashes(draw):
    """Any hash, with tables from 2 rows to nearly 2**31 and vocabularies just as wide."""
    orders, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    biggest = (2**31 - 20_000) // (orders * heads)
    rows = st.one_of(st.integers(2, 40), st.integers(2, biggest), st.just(biggest))
    vocab_size = draw(st.one_of(st.integers(1, 40), st.integers(1, 2**31 - 1),
                                st.just(2**31 - 1)))
    return NgramHash(
        rows_per_head=tuple(draw(rows) for _ in range(orders)), heads=heads,
        layers=tuple(sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=2)))),
        vocab_size=vocab_size, pad_id=draw(st.integers(0, vocab_size - 1)),
        seed=draw(st.integers(0, 2**40)))


@st.composite
def calls(draw):
    """A hash, and arguments for its `row_ids`."""
    hashing = draw(hashes())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch, time, before = draw(st.integers(1, 3)), draw(st.integers(1, 7)), hashing.max_order - 1
    ids_BT = random.integers(0, hashing.vocab_size, (batch, time)).astype(np.int32)
    ids_BT[0, 0] = hashing.vocab_size - 1
    history = random.integers(0, hashing.vocab_size, (batch, before)).astype(np.int32)
    reach_BT = random.integers(0, hashing.max_order + 2, (batch, time)).astype(np.int32)
    return (hashing, ids_BT, draw(st.sampled_from(hashing.layers)),
            draw(st.sampled_from([None, history])), draw(st.sampled_from([None, reach_BT])))


def row_ids_oracle(hashing, ids_BT, layer, history=None, reach_BT=None):
    """The hash as docs/spec.md (2) to (4) have it, one Python int at a time."""
    batch, time = ids_BT.shape
    before = hashing.max_order - 1
    rows = np.zeros((batch, time, before, hashing.heads), np.int64)
    for b, t in itertools.product(range(batch), range(time)):
        past = [hashing.pad_id] * before if history is None else [int(x) for x in history[b]]
        seen = (past + [int(x) for x in ids_BT[b]])[t:t + before + 1][::-1]
        mix = 0
        for back, multiplier in enumerate(hashing.multipliers[layer]):
            hidden = reach_BT is not None and back >= reach_BT[b, t]
            mix ^= (hashing.pad_id if hidden else seen[back]) * multiplier
            assert mix < 2**63
            for head in range(hashing.heads if back else 0):
                rows[b, t, back - 1, head] = mix % hashing.primes[layer][back - 1][head]
    return rows.reshape(batch, time, -1)


@few
@given(calls())
def test_jit_numpy_and_python_integers_agree_bit_for_bit(call):
    hashing, *arguments = call
    expected = row_ids_oracle(hashing, *arguments)
    jitted = hashing.row_ids(*arguments)
    assert jitted.dtype == jnp.int32
    np.testing.assert_array_equal(jitted, expected)
    np.testing.assert_array_equal(hashing.row_ids_numpy(*arguments), expected)
    expected += hashing.offsets[arguments[1]][None, None]
    np.testing.assert_array_equal(hashing.table_ids(*arguments), expected)
    np.testing.assert_array_equal(hashing.table_ids_numpy(*arguments), expected)


def test_modulo_is_exact_at_the_edges_and_for_a_million_random_values():
    random = np.random.default_rng(1)
    primes_OK = np.array([[2, 3, 5, 65521], [65537, 2**30 - 35, 2**30 + 3, 2**31 - 1]], np.int64)
    multiples = (random.integers(0, 2**63, 2000) // primes_OK.reshape(-1, 1)
                 * primes_OK.reshape(-1, 1)).reshape(-1)
    edges = [base + step for base in (0, 2**31, 2**32, 2**62, 2**63 - 5) for step in range(-3, 5)]
    values = np.concatenate([np.array([v for v in edges if 0 <= v < 2**63], np.int64), multiples,
                             np.maximum(multiples, 1) - 1, random.integers(0, 2**63, 100_000)])
    high, low = ((values >> s & 0xFFFFFFFF).astype(np.uint32)[None, :, None, None] for s in (32, 0))
    rest = jax.jit(lambda h, low: ngrams._modulo(h, low, primes_OK))(high, low)
    np.testing.assert_array_equal(rest[0], values[:, None, None] % primes_OK[None])


def test_the_hash_uses_no_64_bit_and_no_float_type():
    with jax.enable_x64(True):  # where a wide type would not be cut down silently
        jaxpr = jax.make_jaxpr(lambda ids, history, reach: SMALL.row_ids(ids, 4, history, reach))(
            jnp.asarray(IDS_BT), jnp.asarray(IDS_BT[:, :2]), jnp.asarray(IDS_BT))
    dtypes = {str(dtype) for dtype in _dtypes(jaxpr.jaxpr)}
    assert "uint32" in dtypes
    assert dtypes <= {"uint32", "int32", "bool"}


def _dtypes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.dtype for v in (*equation.invars, *equation.outvars))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _dtypes(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_vmap_and_an_outer_jit_change_nothing():
    expected = SMALL.row_ids_numpy(IDS_BT, 1)
    outer = jax.jit(jax.vmap(lambda ids_BT: SMALL.row_ids(ids_BT, 1)))
    np.testing.assert_array_equal(outer(jnp.asarray(IDS_BT)[:, None]), expected[:, None])


def test_a_sharded_batch_stays_sharded_and_needs_no_communication():
    ids_BT = np.resize(IDS_BT, (8, 11))
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=explicit)
    if 8 % mesh.size:
        pytest.skip(f"{mesh.size} devices do not divide a batch of 8")
    vocabulary = CompressedVocabulary.identity(300)
    hashed = jax.jit(lambda ids: SMALL.table_ids(
        vocabulary.canonical(ids), 1, reach_BT=reach_from_documents(ids == 5)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(ids_BT, jax.P("data"))
        result = hashed(placed)
        assert result.sharding.spec[0] == "data"
        assert "all-" not in hashed.lower(placed).compile().as_text()
    np.testing.assert_array_equal(
        result, SMALL.table_ids_numpy(ids_BT, 1, reach_BT=reach_from_documents(ids_BT == 5)))


@pytest.mark.parametrize("row_ids", [SMALL.row_ids, SMALL.row_ids_numpy], ids=["jit", "numpy"])
@pytest.mark.parametrize("split", [1, 2, 7])
def test_chunks_with_history_are_the_whole(row_ids, split):
    before = SMALL.max_order - 1
    padded = np.pad(IDS_BT, ((0, 0), (before, 0)), constant_values=SMALL.pad_id)
    chunks = [row_ids(IDS_BT[:, s:s + split], 4, padded[:, s:s + before])
              for s in range(0, IDS_BT.shape[1], split)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), row_ids(IDS_BT, 4))


def test_a_row_depends_on_its_ngram_and_on_no_later_token():
    changed = IDS_BT.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 300
    differ_T = (SMALL.row_ids(IDS_BT, 1) != SMALL.row_ids(changed, 1)).any(axis=(0, 2))
    assert np.flatnonzero(differ_T).tolist() == [5, 6, 7]


def test_reach_from_documents_starts_each_document_anew():
    first_BT = np.zeros(IDS_BT.shape, bool)
    first_BT[0, [0, 3, 4]] = first_BT[1, 8] = True
    reach_BT = reach_from_documents(first_BT)
    assert reach_BT.dtype == jnp.int32
    assert reach_BT[0].tolist() == [1, 2, 3, 1, 1, 2, 3, 4, 5, 6, 7]
    rows = SMALL.row_ids(IDS_BT, 1, reach_BT=reach_BT)
    for row, start, stop in ((0, 0, 3), (0, 3, 4), (0, 4, 11), (1, 0, 8), (1, 8, 11), (2, 0, 11)):
        alone = SMALL.row_ids_numpy(IDS_BT[row:row + 1, start:stop], 1)
        np.testing.assert_array_equal(rows[row, start:stop], alone[0])


def test_reach_from_dead_hides_the_dead_and_all_that_is_older():
    dead_BT = np.zeros((2, 9), bool)
    dead_BT[0, [2, 3]] = True
    reach_BT = reach_from_dead(dead_BT)
    assert reach_BT[0, 2:].tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert (np.minimum(reach_BT[0, :2], 3) == 3).all()
    rows = SMALL.row_ids(IDS_BT[:2, :9], 1, reach_BT=reach_BT)
    pads = SMALL.row_ids_numpy(np.full((1, 9), SMALL.pad_id), 1)
    np.testing.assert_array_equal(rows[0, 2:4], pads[0, 2:4])
    np.testing.assert_array_equal(rows[0, 4:], SMALL.row_ids_numpy(IDS_BT[:1, 4:9], 1)[0])
    np.testing.assert_array_equal(rows[1], SMALL.row_ids_numpy(IDS_BT[1:2, :9], 1)[0])


@few
@given(st.lists(st.booleans(), min_size=4, max_size=9), st.integers(1, 8), st.booleans())
def test_reach_agrees_with_its_definition_and_between_chunks(marks, cut, dead):
    reach_of = reach_from_dead if dead else reach_from_documents
    cut, before = min(cut, len(marks) - 1), SMALL.max_order - 1
    mark_BT, expected = np.array([marks]), []
    for t in range(len(marks)):
        last = max((i for i in range(t + 1) if marks[i]), default=-100)
        expected.append(min(t - last + (0 if dead else 1), SMALL.max_order))
    whole = np.minimum(reach_of(mark_BT), SMALL.max_order)
    assert whole[0].tolist() == expected
    history = np.pad(mark_BT, ((0, 0), (before, 0)))[:, cut:cut + before]
    tail = np.minimum(reach_of(mark_BT[:, cut:], history), SMALL.max_order)
    assert tail.tolist() == whole[:, cut:].tolist()


@pytest.mark.parametrize("wrong", [-1, 2**31 - 1, None], ids=["negative", "large", "one too many"])
def test_an_id_that_does_not_exist_has_no_row_and_no_other_has_another(wrong):
    """Nor has an n-gram that looks back at it, unless its reach hides it."""
    hashing, layer, ids = SMALL, SMALL.layers[-1], IDS_BT
    bad = ids.copy()
    bad[1, 4] = hashing.vocab_size if wrong is None else wrong
    reach = np.full(ids.shape, ids.shape[1])
    reach[1, 5:] = range(1, 7)
    for method in (hashing.row_ids, hashing.table_ids):
        for hidden in (None, reach):
            good, seen = (np.asarray(method(x, layer, reach_BT=hidden)) for x in (ids, bad))
            expected = good.copy()
            for order in range(2, hashing.max_order + 1):
                heads = slice((order - 2) * hashing.heads, (order - 1) * hashing.heads)
                expected[1, 4:5 if hidden is not None else 4 + order, heads] = -1
            np.testing.assert_array_equal(seen, expected)


def test_primes_are_never_reused_and_tables_lie_end_to_end():
    hashing = NgramHash(rows_per_head=(20, 20, 5), heads=2, layers=(0, 2), vocab_size=9, pad_id=0)
    assert hashing.primes == {0: ((23, 29), (31, 37), (5, 7)), 2: ((41, 43), (47, 53), (11, 13))}
    assert hashing.offsets[0].tolist() == [0, 23, 52, 83, 120, 125]
    assert hashing.table_rows == {0: 132, 2: 208}


def test_is_prime_agrees_with_a_sieve_and_at_2_to_the_31():
    sieve = np.ones(60_000, bool)
    sieve[:2] = False
    for number in range(2, 245):
        sieve[number * number::number] = False
    assert [is_prime(n) for n in range(60_000)] == sieve.tolist()
    assert is_prime(2**31 - 1)
    strong_pseudoprimes = (2047, 1_373_653, 25_326_001, 46_349 * 46_351)
    assert not any(map(is_prime, strong_pseudoprimes))


@pytest.mark.parametrize("name", ["rows_per_head", "heads", "layers", "vocab_size", "pad_id",
                                  "seed"])
def test_the_fingerprint_sees_every_setting(name):
    other = {"rows_per_head": (50, 71), "heads": 3, "layers": (1, 5), "vocab_size": 301,
             "pad_id": 8, "seed": 1}
    changed = dataclasses.replace(SMALL, **{name: other[name]})
    assert changed.fingerprint != SMALL.fingerprint
    assert dataclasses.replace(changed, **{name: getattr(SMALL, name)}).fingerprint == (
        SMALL.fingerprint)


def test_constants_are_json_and_whole():
    constants = json.loads(json.dumps(SMALL.constants()))
    assert constants == SMALL.constants()
    assert constants["multipliers"]["4"] == list(SMALL.multipliers[4])
    assert constants["primes"]["1"] == [list(heads) for heads in SMALL.primes[1]]


@pytest.mark.parametrize(("change", "complaint"), [
    ({"rows_per_head": ()}, "rows_per_head"),
    ({"rows_per_head": (50, 1)}, "rows_per_head"),
    ({"rows_per_head": (2**30, 2**30)}, "2\\*\\*31"),
    ({"rows_per_head": (2**31 - 1,), "heads": 1}, "2\\*\\*31"),  # for the second layer
    ({"heads": 0}, "heads"),
    ({"layers": ()}, "layers"),
    ({"layers": (4, 1)}, "layers"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 2**31}, "vocab_size"),
    ({"pad_id": 300}, "pad_id = 300"),
    ({"pad_id": -1}, "pad_id = -1"),
    ({"seed": -1}, "seed"),
])
def test_a_wrong_setting_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("row_ids", [SMALL.row_ids, SMALL.row_ids_numpy, SMALL.table_ids,
                                     SMALL.table_ids_numpy])
@pytest.mark.parametrize(("arguments", "complaint"), [
    ((IDS_BT, 2), "layer = 2"),
    ((IDS_BT[0], 1), "ids.shape"),
    ((IDS_BT.astype(np.float32), 1), "ids.dtype"),
    ((IDS_BT, 1, IDS_BT[:, :3]), "history.shape"),
    ((IDS_BT, 1, IDS_BT[:2, :2]), "history.shape"),
    ((IDS_BT, 1, None, IDS_BT[:, :2]), "reach.shape"),
])
def test_wrong_arguments_are_refused(row_ids, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        row_ids(*arguments)


@pytest.mark.parametrize("wrong", [-1, 300])
def test_numpy_refuses_ids_that_do_not_exist(wrong):
    with pytest.raises(UserError, match=f"canonical id = {wrong}"):
        SMALL.row_ids_numpy(np.full((1, 2), wrong), 1)
    with pytest.raises(UserError, match=f"canonical id = {wrong}"):
        SMALL.row_ids_numpy(IDS_BT[:1], 1, np.full((1, 2), wrong))


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CLASSES = [  # tokens of one line are one canonical id
    ["a", "A", "á", " a", "a \t", "Ａ"],
    [" ", "  ", "\n", "\t \r", "\u00a0"],
    ["b c", "B\nC", "b  ç"],
    ["ﬁ", "fi"],
    ["\u0301"], ["\u0300"],  # accents alone: nothing would be left, so the text itself counts
    [b"\xc3"], [b"\xa9"],  # parts of a character, told apart by their own names
    ["\ufffd"],
    ["<|end|>", "<|END|>"],
    ["<|pad|>"],
]


def _tiny_tokenizer():
    names = BYTES.alphabet()
    assert len(names) == 256
    by_byte = {BYTES.pre_tokenize_str(chr(i))[0][0]: i for i in range(128)}
    parts = {b"\xc3": "Ã", b"\xa9": "©"}
    assert set(parts.values()) <= set(names) - set(by_byte)
    texts = [text for line in CLASSES for text in line if not str(text).startswith("<|")]
    tokens = [parts[t] if isinstance(t, bytes) else BYTES.pre_tokenize_str(t)[0][0] for t in texts]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|END|>", "<|pad|>"])
    return tokenizer


def test_tokens_that_differ_by_case_accents_or_spaces_are_one():
    vocabulary = CompressedVocabulary.from_tokenizer(_tiny_tokenizer())
    expected = [number for number, line in enumerate(CLASSES) for _ in line]
    assert vocabulary.lookup.tolist() == expected
    assert vocabulary.lookup.dtype == np.int32
    assert vocabulary.size == len(CLASSES)


def test_canonical_looks_up_numpy_and_jax_arrays():
    vocabulary = CompressedVocabulary([0, 1, 0, 2])
    raw = np.array([[3, 2], [1, 0]])
    np.testing.assert_array_equal(vocabulary.canonical(raw), [[2, 0], [1, 0]])
    assert vocabulary.canonical(raw).dtype == np.int32
    jitted = jax.jit(vocabulary.canonical)(jnp.asarray(raw))
    assert jitted.dtype == jnp.int32
    np.testing.assert_array_equal(jitted, [[2, 0], [1, 0]])
    assert vocabulary.canonical(jnp.array([-3, 99])).tolist() == [-1, -1]
    for wrong in (-1, 4):
        with pytest.raises(UserError, match=f"token id = {wrong}: must be in 0..3"):
            vocabulary.canonical(np.array([0, wrong]))
    with pytest.raises(UserError, match="dtype"):
        vocabulary.canonical(np.array([0.5]))


def test_identity_compresses_nothing():
    vocabulary = CompressedVocabulary.identity(5)
    assert vocabulary.size == 5
    assert vocabulary.canonical(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="vocab_size = 0"):
        CompressedVocabulary.identity(0)


@pytest.mark.parametrize("lookup", [[], [[0, 1]], [0.0, 1.0], [1, 2], [0, 2], [-1, 0]])
def test_a_lookup_that_is_no_surjection_is_refused(lookup):
    with pytest.raises(UserError, match="lookup"):
        CompressedVocabulary(np.array(lookup))


def test_vocabularies_are_equal_by_digest_and_may_be_static_arguments():
    one, same = (CompressedVocabulary(np.array([0, 1, 0], t)) for t in ("i8", "u2"))
    other = CompressedVocabulary([0, 1, 1])
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    looked_up = jax.jit(lambda v, ids: v.canonical(ids), static_argnums=0)
    assert looked_up(one, jnp.arange(3)).tolist() == [0, 1, 0]
    assert looked_up(other, jnp.arange(3)).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        one.lookup[0] = 1


def test_the_benchmark_hashes_equal_ids():
    result = hash_benchmark(batch=2, time_steps=64, repeats=1, hashing=SMALL)
    assert result["equal"]
    assert result["tokens"] == 128
    assert result["ratio"] == pytest.approx(
        result["tokens_per_s"] / result["numpy_tokens_per_s"])
