"""Rows to read: each once, and every asked one found again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engram_jax.offload import dedup as fetch_module
from engram_jax.offload.dedup import distinct


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(arrays.arrays(st.sampled_from([np.int32, np.int64]),
                     arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9),
                     elements=st.one_of(st.integers(0, 9), st.integers(0, 2**31 - 1))))
def test_each_id_is_read_once_and_found_again(ids):
    fetch = distinct(ids)
    assert fetch.ids_U.dtype == np.int64
    assert fetch.inverse.dtype == np.int32
    assert fetch.inverse.shape == ids.shape
    np.testing.assert_array_equal(np.sort(fetch.ids_U), np.unique(ids))
    np.testing.assert_array_equal(fetch.ids_U[fetch.inverse], ids)


@pytest.mark.parametrize("count", [4096, 65_537])
def test_many(count):
    ids = np.random.default_rng(0).zipf(1.3, (count, 3)) % 2**31
    fetch = distinct(ids)
    np.testing.assert_array_equal(fetch.ids_U, np.unique(ids))
    np.testing.assert_array_equal(fetch.ids_U[fetch.inverse], ids)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_head_at_a_time(overlap):
    """Heads with ranges of their own, and a head whose last id is the first of the next."""
    ids = np.random.default_rng(0).integers(0, 500, (3, 2000, 4)) + 500 * np.arange(4)
    ids[0, 0, 1], ids[1, 5, 2] = 999, 999 if overlap else 1000
    fetch = distinct(ids)
    np.testing.assert_array_equal(fetch.ids_U, np.unique(ids))
    np.testing.assert_array_equal(fetch.ids_U[fetch.inverse], ids)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 5), max_size=20), st.booleans())
def test_whole_groups(numbers, same_key):
    """Each n-gram once, its heads side by side; also if all their keys were equal."""
    ids = (np.array(numbers, np.int64)[:, None] * np.array([1, 3, 0, 2]) % 7).reshape(-1, 1, 4)
    ids += 10 * np.arange(4)
    with pytest.MonkeyPatch.context() as patch:
        if same_key:
            patch.setattr(fetch_module, "signatures", lambda ids: np.zeros(len(ids), np.uint64))
        fetch = distinct(ids, group=2)
    np.testing.assert_array_equal(fetch.ids_U[fetch.inverse], ids)
    assert fetch.inverse.shape == ids.shape
    groups = fetch.ids_U.reshape(-1, 2)
    np.testing.assert_array_equal(np.unique(groups, axis=0),
                                  np.unique(ids.reshape(-1, 2), axis=0))
    assert len(np.unique(groups, axis=0)) == len(groups)
