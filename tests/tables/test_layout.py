"""The table: layout and combining gradients of rows."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import filled, flat, random

from engram_jax.hashing.ngrams import NgramHash
from engram_jax.tables import exchange, rounding
from engram_jax.tables.exchange import UNUSED
from engram_jax.tables.layout import TableLayout

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# --- Layout ---


@pytest.mark.parametrize("shards", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_shape_has_room_for_every_row_and_less_than_a_shard_of_padding(rows, shards):
    layout = TableLayout(rows=rows, dim=3, shards=shards)
    assert layout.shape == (shards, -(-rows // shards), 3)
    shard, row = layout.locate(jnp.arange(rows))
    places = set(zip(np.asarray(shard).tolist(), np.asarray(row).tolist(), strict=True))
    assert places == {(r % shards, r // shards) for r in range(rows)}


@pytest.mark.parametrize("shards", [1, 7, 64])
def test_gather_gives_rows_and_zeros_outside(shards):
    layout = TableLayout(rows=100, dim=5, shards=shards)
    rows_RD = random(100, 5)
    table = jnp.asarray(filled(layout, rows_RD))
    ids_BT = np.array([[0, 99, 7, 7], [64, 50, 1, 98]], np.int32)
    np.testing.assert_array_equal(layout.gather(table, ids_BT), rows_RD[ids_BT])
    outside = np.array([-1, -7, -100, 100, 101, 127, 128, 2**30, UNUSED, -(2**31)], np.int32)
    np.testing.assert_array_equal(layout.gather(table, outside), np.zeros((10, 5)))


@pytest.mark.parametrize("shards", [1, 7, 64])
def test_put_replaces_rows_and_drops_what_is_outside(shards):
    layout = TableLayout(rows=100, dim=5, shards=shards)
    rows_RD, new_ND = random(100, 5), random(9, 5, seed=1)
    ids_N = np.array([3, 99, -1, 100, 0, UNUSED, 64, -(2**31), 101], np.int32)
    out = layout.put(jnp.asarray(filled(layout, rows_RD)), ids_N, new_ND)
    expected = rows_RD.copy()
    for row, values in zip(ids_N, new_ND, strict=True):
        if 0 <= row < 100:
            expected[row] = values
    kept, padding = flat(layout, out)
    np.testing.assert_array_equal(kept, expected)
    assert (padding == 777).all(), "padding rows are never written"


def test_gather_and_put_of_scalars_a_row():
    layout = TableLayout(rows=10, dim=4, shards=3)
    counts_SR = jnp.zeros(layout.shape[:2], jnp.int32)
    counts_SR = layout.put(counts_SR, jnp.array([4, 9, 12]), jnp.array([40, 90, 120]))
    assert layout.gather(counts_SR, jnp.array([4, 9, 12, 0])).tolist() == [40, 90, 0, 0]
    assert int(counts_SR.sum()) == 130


def test_init():
    layout = TableLayout(rows=1000, dim=20, shards=8)
    table = layout.init(jax.random.key(0), 0.02)
    assert table.shape == layout.shape
    assert table.dtype == jnp.float32
    assert float(jnp.std(table)) == pytest.approx(0.02, rel=0.05)
    assert not layout.init(jax.random.key(0), 0.0).any()


@pytest.mark.parametrize("std", [0.0, 0.02])
def test_init_in_bfloat16_is_the_float32_table_rounded_to_nearest(std):
    layout = TableLayout(rows=100, dim=20, shards=8)
    bits = layout.init(jax.random.key(0), std, "bfloat16")
    assert bits.dtype == jnp.uint16
    expected = layout.init(jax.random.key(0), std).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rounding.decode(bits), expected.astype(jnp.float32))


@pytest.mark.parametrize("shards", [1, 7, 64])
def test_add_adds_to_rows_and_drops_what_is_outside(shards):
    layout = TableLayout(rows=100, dim=5, shards=shards)
    rows_RD, new_ND = random(100, 5), random(5, 5, seed=1)
    out = layout.add(
        jnp.asarray(filled(layout, rows_RD)), np.array([3, 99, 100, UNUSED, -1], np.int32), new_ND)
    kept, padding = flat(layout, out)
    rows_RD[[3, 99]] += new_ND[:2]
    np.testing.assert_array_equal(kept, rows_RD)
    assert (padding == 777).all()


@pytest.mark.parametrize("shards", [1, 7, 64])
def test_row_ids_are_where_locate_finds_them(shards):
    layout = TableLayout(rows=100, dim=5, shards=shards)
    ids, padding = flat(layout, layout.row_ids())
    np.testing.assert_array_equal(ids, np.arange(100))
    assert (padding >= 100).all()


def test_the_row_that_the_design_page_follows():
    """docs/design.md, "Where a row lies": row id in a head, row id, key, device and local row."""
    hashing = NgramHash(rows_per_head=(10_000, 10_000), heads=4, layers=(1,), vocab_size=9500,
                        pad_id=0)
    tokens = np.array([[17, 4, 9120]])
    layout = TableLayout(rows=hashing.table_rows[1], dim=8, shards=64)
    row_id = int(hashing.table_ids_numpy(tokens, 1)[0, 2, 1])
    key, part = int(layout.key(row_id)), layout.part(8)
    assert int(hashing.row_ids_numpy(tokens, 1)[0, 2, 1]) == 5824
    assert (row_id, key, key // part.rows, key % part.rows) == (15831, 29135, 2, 9039)
    assert int(layout.row_id(key)) == row_id
    page = (pathlib.Path(__file__).parents[2] / "docs" / "design.md").read_text()
    for number in (5824, row_id, key, key % part.rows):
        assert re.search(rf"^ *(row id|key|local row).* {number} ", page, re.MULTILINE)


# --- Combining gradients ---


@functools.cache
def combined():
    return jax.jit(exchange.combine)


def check_combine(ids_N, grads_ND):
    unique = combined()(ids_N, grads_ND)
    distinct = np.unique(ids_N)
    expected = np.zeros((ids_N.size, grads_ND.shape[1]))
    np.add.at(expected, np.searchsorted(distinct, ids_N), grads_ND.astype(np.float64))
    assert unique.ids_U.dtype == jnp.int32
    assert unique.grads_UD.dtype == jnp.float32
    assert int(unique.used) == distinct.size
    np.testing.assert_array_equal(unique.ids_U[:distinct.size], distinct)
    assert (np.asarray(unique.ids_U[distinct.size:]) == UNUSED).all()
    np.testing.assert_allclose(unique.grads_UD, expected, rtol=1e-5, atol=1e-5)
    assert not np.asarray(unique.grads_UD[distinct.size:]).any()


@few
@given(st.sampled_from([1, 2, 7, 32]), st.integers(1, 2**31 - 2), st.integers(0, 2**32))
def test_combine_sums_the_gradients_of_equal_ids(size, largest, seed):
    ids_N = np.random.default_rng(seed).integers(0, largest, size).astype(np.int32)
    check_combine(ids_N, random(size, 3, seed=seed))


@pytest.mark.parametrize("ids", [[5] * 7, [3, 1, 4, 0, 9, 2, 6], [2**31 - 2] * 6 + [0], [0] * 7])
def test_combine_of_all_the_same_and_all_different(ids):
    check_combine(np.array(ids, np.int32), random(7, 3))


def test_combine_sums_half_precision_gradients_in_float32():
    """4096 ones and a half: bfloat16 has no number near 4096.5, and stops counting at 256."""
    grads_ND = jnp.ones((4097, 1), jnp.bfloat16).at[-1].set(0.5)
    unique = combined()(jnp.zeros(4097, jnp.int32), grads_ND)
    assert float(unique.grads_UD[0, 0]) == 4096.5


def test_combine_does_not_depend_on_the_order_of_other_ids():
    """A run is summed from its first occurrence to its last: the same bits wherever it lies."""
    values_ND = random(64, 3)
    alone = combined()(np.zeros(64, np.int32), values_ND).grads_UD[0]
    mixed_ids = np.stack([np.zeros(64), np.arange(64) + 5], axis=1).reshape(-1).astype(np.int32)
    mixed_grads = np.stack([values_ND, random(64, 3, seed=1)], axis=1).reshape(-1, 3)
    first, again = (combined()(mixed_ids, mixed_grads) for _ in range(2))
    np.testing.assert_array_equal(first.grads_UD, again.grads_UD)
    np.testing.assert_array_equal(first.grads_UD[0], alone)
