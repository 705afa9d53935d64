"""Memory use: counts by hand, and the cache curve against a cache that is run."""

import collections

import numpy as np
import pytest

from engram_jax.insides import memory_use


def test_counts_and_zipf():
    counts = memory_use.access_counts(np.array([[0, 2], [2, 5], [2, 0]]), 7)
    assert counts.tolist() == [2, 0, 3, 0, 0, 1, 0]
    assert memory_use.zipf(counts).tolist() == [3, 2, 1]


IDS = np.array([[0, 10], [1, 10], [2, 11], [0, 10], [2, 12], [0, 10]])
NGRAMS = np.array([7, 8, 9, 7, 5, 6])  # 6 has the rows of 7


def test_occupancy_by_hand():
    """Head 0 reads 0 0 1 2 2 for n-grams 7 6 8 9 5, head 1 reads 10 10 10 11 12."""
    found = memory_use.occupancy(IDS, NGRAMS, rows=20)
    assert (found.rows, found.touched, found.reads) == (20, 6, 12)
    assert found.share == 0.3
    assert found.collided == pytest.approx((4 + 3) / 10)
    assert found.heads_collided == pytest.approx(2 / 5)


def test_collisions_by_frequency_by_hand():
    """N-gram 7 comes twice: of 3 reads of row 0 one is another's, of 4 of row 10 two."""
    found = memory_use.collisions_by_frequency(IDS, NGRAMS, bands=(1, 2))
    assert found[2] == pytest.approx((1 / 3 + 1 / 2) / 2)
    others = [(2 / 3 + 3 / 4) / 2, (0 + 3 / 4) / 2, (1 / 2 + 0) / 2, (1 / 2 + 0) / 2]
    assert found[1] == pytest.approx(np.mean(others))


def run_lru(keys, size):
    cache, hits = collections.OrderedDict(), 0
    for key in keys:
        hits += key in cache
        cache[key] = None
        cache.move_to_end(key)
        if len(cache) > size:
            cache.popitem(last=False)
    return hits / len(keys)


def test_the_cache_curve_is_that_of_a_cache_that_is_run():
    keys = np.random.default_rng(0).zipf(1.3, 3000) % 500
    sizes = [1, 2, 7, 50, 200, 1000]
    found = memory_use.lru_hit_rates(keys, sizes)
    assert found == [run_lru(keys.tolist(), size) for size in sizes]
    assert found[0] < found[3] < found[-1]


def test_norms_by_count():
    table = np.array([[3.0, 4], [0, 1], [0, 2], [6, 8]])
    found = memory_use.norms_by_count(table, np.array([0, 1, 1, 7]), bands=(0, 1, 5))
    assert found == {0: 5, 1: 1.5, 5: 10}
