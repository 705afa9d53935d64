"""Counting n-grams: as a Counter of tuples does."""

import collections

import numpy as np
import pytest

from engram_jax.offload.ngram_counts import NgramCounts

K = 3


@pytest.mark.parametrize("parts", [1, 7, 100])
def test_the_most_frequent_come_first(parts):
    random = np.random.default_rng(parts)
    ids_BTH = (random.zipf(1.4, (1, 200, 1)) % 50)[..., None] * 10 + np.arange(2 * K).reshape(2, K)
    ids_BTH = ids_BTH.reshape(1, 200, 2 * K)
    counts = NgramCounts(K)
    for part in np.array_split(ids_BTH, parts, axis=1):
        counts.add(part)
    expected = collections.Counter(map(tuple, ids_BTH.reshape(-1, K).tolist()))
    found = [tuple(ids) for ids in counts.most_frequent().tolist()]
    assert len(found) == len(set(found)) == len(expected)
    times = [expected[ids] for ids in found]
    assert times == sorted(times, reverse=True)


def test_nothing_has_no_ngrams():
    counts = NgramCounts(K)
    assert counts.most_frequent().shape == (0, K)
    counts.add(np.empty((1, 0, K), np.int64))
    assert counts.most_frequent().shape == (0, K)


def test_small_integers_are_counted_and_what_was_counted_stays():
    counts = NgramCounts(K)
    counts.add(np.array([[1, 2, 3, 4, 5, 6]], np.int32))
    counts.add(np.array([4, 5, 6], np.int32))
    for _ in range(2):
        assert counts.most_frequent().tolist() == [[4, 5, 6], [1, 2, 3]]
