"""A cache over a home: the same rows bit for bit; the least recently used go; counts are right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.errors import MachineError, UserError
from engram_jax.offload import host_cache, ngram_index
from engram_jax.offload.dedup import distinct, signatures
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.offload.host_cache import CachedTable
from engram_jax.offload.ngram_index import WAYS

FORMAT, ROWS, K = RowFormat("fp8", 40), 900, 3
ENTRY = K * FORMAT.row_bytes


class Below:
    """A home that remembers what it was asked, and may be told to fail."""

    group, fingerprint = 1, ""

    def __init__(self):
        packed = np.random.default_rng(0).integers(0, 256, (ROWS, FORMAT.row_bytes))
        self.table = HostTable(FORMAT, packed.astype(np.uint8))
        self.format, self.rows = self.table.format, self.table.rows
        self.asked, self.left, self.closed = [], 99, False

    def lookup(self, ids_U, out=None):
        self.left -= 1
        if self.left < 0:
            raise MachineError("the disk is gone")
        self.asked.append(ids_U.tolist())
        return self.table.lookup(ids_U, out)

    def fill(self, ids_GK):
        self.filled = ids_GK

    def tiers(self):
        return {"below": self.table.tiers()["host"]}

    def close(self):
        self.closed = True


@pytest.fixture(name="below")
def a_home():
    return Below()


def ngrams(numbers):
    """The ids of n-grams that are numbers below 300; neighbours share the rows of some heads."""
    heads = np.stack([np.array(numbers) // 4, np.array(numbers) % 7, np.array(numbers)], axis=-1)
    return (heads + np.arange(K) * 300).reshape(-1)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(sets=st.integers(1, 5), same_key=st.booleans(),
       asked=st.lists(st.lists(st.integers(0, 60), max_size=40), max_size=12))
def test_rows_are_those_of_the_home_below(sets, same_key, asked):
    """In any order, with repeats, more of a set than it has ways, and if all keys were equal."""
    below = Below()
    cache = CachedTable(below, K, sets * WAYS * ENTRY)
    with pytest.MonkeyPatch.context() as patch:
        if same_key:
            patch.setattr(ngram_index, "signatures", lambda ids: np.zeros(len(ids), np.uint64))
        for numbers in asked:
            ids = ngrams(numbers) if numbers else np.empty(0, np.int64)
            np.testing.assert_array_equal(cache.lookup(ids), below.table.lookup(ids))
    found = cache.tiers()["host cache"]
    assert found.asked == K * sum(map(len, asked))
    assert found.asked - found.hits == sum(map(len, below.asked))
    assert found.lookups == len(asked)


def test_what_was_asked_for_before_is_not_read_again(below):
    cache = CachedTable(below, K, 100 * ENTRY)
    cache.lookup(ngrams([1, 2, 3]))
    out = np.full((9, FORMAT.row_bytes), 7, np.uint8)
    cache.lookup(ngrams([2, 4]), out)
    found = cache.tiers()
    assert below.asked == [ngrams([1, 2, 3]).tolist(), ngrams([4]).tolist()]
    np.testing.assert_array_equal(out[:6], below.table.lookup(ngrams([2, 4])))
    assert (out[6:] == 7).all()
    assert list(found) == ["host cache", "below"]
    here = found["host cache"]
    assert (here.asked, here.hits, here.hit_rate) == (5 * K, K, 0.2)
    assert (here.bytes, found["below"].bytes) == (ENTRY, 4 * ENTRY)
    assert 0 < found["below"].seconds < here.seconds


def test_a_cache_over_a_table_in_host_memory_counts_for_itself(below):
    cache = CachedTable(below.table, K, WAYS * ENTRY)
    for _ in range(3):
        cache.lookup(ngrams([1, 2]))
    counts = cache.tiers()
    assert {name: (tier.lookups, tier.asked, tier.hits) for name, tier in counts.items()} == {
        "host cache": (3, 6 * K, 4 * K), "host": (1, 2 * K, 2 * K)}
    with pytest.raises(UserError, match="below = 'host cache': is a cache in host memory itself"):
        CachedTable(cache, K, WAYS * ENTRY)


def test_the_least_recently_used_makes_room(below):
    """One set: it holds `WAYS` n-grams, and one that was used again stays."""
    cache = CachedTable(below, K, WAYS * ENTRY)
    for number in range(WAYS):
        cache.lookup(ngrams([number]))
    cache.lookup(ngrams([0]))
    cache.lookup(ngrams([WAYS]))  # in the place of 1
    below.asked.clear()
    for number in (0, *range(2, WAYS + 1)):
        cache.lookup(ngrams([number]))
    assert below.asked == []
    cache.lookup(ngrams([1]))
    assert below.asked == [ngrams([1]).tolist()]


def test_what_failed_below_is_not_kept(below):
    cache = CachedTable(below, K, WAYS * ENTRY)
    below.left = 0
    with pytest.raises(MachineError, match="the disk is gone"):
        cache.lookup(ngrams([1]))
    below.left = 99
    np.testing.assert_array_equal(cache.lookup(ngrams([1])), below.table.lookup(ngrams([1])))
    assert cache.tiers()["host cache"].hits == 0


class Refusing(np.ndarray):
    """Rows that cannot be written to, as where memory runs out meanwhile."""

    def __setitem__(self, key, value):
        raise MemoryError


def test_what_could_not_be_kept_is_asked_for_again(below):
    """And what it would have taken the place of is not served from there either."""
    cache = CachedTable(below, K, WAYS * ENTRY)
    for number in range(WAYS):
        cache.lookup(ngrams([number]))
    entries, cache._entries = cache._entries, cache._entries.view(Refusing)
    with pytest.raises(MemoryError):
        cache.lookup(ngrams([100]))
    cache._entries = entries
    cache._entries[:] = 7
    np.testing.assert_array_equal(cache.lookup(ngrams([100])), below.table.lookup(ngrams([100])))
    below.asked.clear()
    np.testing.assert_array_equal(cache.lookup(ngrams([0])), below.table.lookup(ngrams([0])))
    assert below.asked == [ngrams([0]).tolist()]


def test_a_filled_cache_has_the_first_of_each_set(below):
    """All of them where it has room, and below is filled, too; what it held goes."""
    first = ngrams(range(100)).reshape(-1, K)
    cache = CachedTable(below, K, 4 * WAYS * ENTRY)
    cache.lookup(ngrams([250]))
    cache.fill(first)
    np.testing.assert_array_equal(below.filled, first)
    sets = cache._index._set(signatures(first))
    assert set(sets.tolist()) == {0, 1, 2, 3}
    kept = [n for n in range(100) if np.count_nonzero(sets[:n] == sets[n]) < WAYS]
    below.asked.clear()
    np.testing.assert_array_equal(cache.lookup(ngrams(kept)), below.table.lookup(ngrams(kept)))
    assert below.asked == []
    cache.lookup(ngrams([250]))
    assert below.asked == [ngrams([250]).tolist()]


def test_of_a_filled_set_the_last_makes_room_first(below):
    cache = CachedTable(below, K, WAYS * ENTRY)
    cache.fill(ngrams(range(WAYS)).reshape(-1, K))
    cache.lookup(ngrams([100, 101]))
    below.asked.clear()
    cache.lookup(ngrams([*range(WAYS - 2), 100, 101]))
    assert below.asked == []


def test_a_cache_that_could_not_be_filled_has_what_was_read(below, monkeypatch):
    monkeypatch.setattr(host_cache, "FILLED_AT_ONCE", 3)
    cache = CachedTable(below, K, 4 * WAYS * ENTRY)
    below.left = 2
    with pytest.raises(MachineError, match="the disk is gone"):
        cache.fill(ngrams(range(9)).reshape(-1, K))
    below.left = 99
    below.asked.clear()
    rows = cache.lookup(ngrams(range(9)))
    np.testing.assert_array_equal(rows, below.table.lookup(ngrams(range(9))))
    (asked,) = below.asked
    assert len(asked) == 3 * K


def test_nothing_empties_a_cache(below):
    cache = CachedTable(below, K, WAYS * ENTRY)
    cache.lookup(ngrams([1]))
    cache.fill(np.empty((0, K), np.int64))
    below.asked.clear()
    cache.lookup(ngrams([1]))
    assert below.asked == [ngrams([1]).tolist()]


def test_a_fetch_of_whole_ngrams_fits(below):
    """Distinct n-grams, though two of them share a row."""
    ids_BTH = ngrams([5, 9, 5, 1]).reshape(2, 2, K)
    ids_BTH[1, 1, 0] = ids_BTH[0, 0, 0]
    fetch = distinct(ids_BTH, group=K)
    assert fetch.ids_U.size == 3 * K
    rows = CachedTable(below, K, WAYS * ENTRY).lookup(fetch.ids_U)
    np.testing.assert_array_equal(
        rows[fetch.inverse], below.table.lookup(ids_BTH.reshape(-1)).reshape(2, 2, K, -1))


def test_bad_requests_are_refused(below):
    least = WAYS * ENTRY
    line = f"capacity_bytes = {least - 1}: must be a whole number, at least {least}"
    with pytest.raises(UserError, match=line):
        CachedTable(below, K, least - 1)
    with pytest.raises(UserError, match="group = 0: must be at least 1"):
        CachedTable(below, 0, least)
    cache = CachedTable(below, K, least)
    with pytest.raises(UserError, match=r"n-grams = \(2, 4\): must be \[G, 3\]"):
        cache.fill(np.zeros((2, 4), np.int64))
    with pytest.raises(UserError, match="row ids = 4: must be n-grams of 3 ids each"):
        cache.lookup(np.arange(4))
    with pytest.raises(UserError, match=r"row id = 900: must be in 0..899"):
        cache.lookup(np.array([1, 2, 900]))
    assert cache.tiers()["host cache"].lookups == 0
    assert cache.tiers()["host cache"].hit_rate == 0
    cache.close()
    assert below.closed
    with pytest.raises(UserError, match="row id = 1"):
        cache.lookup(np.array([1, 1, 1]))
