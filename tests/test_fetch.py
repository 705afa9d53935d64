"""Rows to read: each once, and every asked one found again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engram_jax.memory.fetch import distinct


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
