"""Packed rows: every dtype's decoding is the same bits in NumPy and under jit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engram_jax.config import ROW_DTYPES
from engram_jax.errors import UserError
from engram_jax.offload.formats import RowFormat

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
rows_UD = arrays.arrays(np.float32, (3, 40), elements=st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-2.0**120, max_value=2.0**120))


def normal(rows, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def bits(values):
    return np.asarray(values).view(np.uint32)


@pytest.mark.parametrize(("dtype", "row_bytes"), [
    ("float32", 1024), ("bfloat16", 512), ("int8", 260), ("fp8", 264)])
def test_bytes_of_a_row_of_256_columns(dtype, row_bytes):
    assert RowFormat(dtype, 256).row_bytes == row_bytes
    assert RowFormat(dtype, 256).pack(normal(3, 256)).shape == (3, row_bytes)


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 80])
def test_jit_decodes_to_the_bits_of_numpy(dtype, dim):
    """Also inside a larger program, where a product might be fused with what follows."""
    form = RowFormat(dtype, dim)
    packed_UB = form.pack(normal(6, dim) * np.logspace(-30, 30, 6, dtype=np.float32)[:, None])
    expected = form.unpack_numpy(packed_UB)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(bits(jax.jit(form.unpack)(packed_UB)), bits(expected))
    stacked = jnp.asarray(packed_UB).reshape(2, 3, -1)
    np.testing.assert_array_equal(
        bits(jax.jit(form.unpack)(stacked)).reshape(6, dim), bits(expected))
    other = normal(6, dim, seed=1)
    both = jax.jit(lambda p, o: form.unpack(p) + o)(packed_UB, other)
    np.testing.assert_array_equal(bits(both), bits(expected + other))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@few
@given(rows_UD)
def test_any_finite_row_is_decoded_alike_and_near_what_it_was(dtype, rows):
    form = RowFormat(dtype, 40)
    packed = form.pack(rows)
    found = form.unpack_numpy(packed)
    np.testing.assert_array_equal(bits(jax.jit(form.unpack)(packed)), bits(found))
    largest = np.abs(rows).max(axis=-1, keepdims=True).astype(np.float64)
    step = {"float32": 0, "bfloat16": 2**-8, "int8": 0.502 / 127, "fp8": 2**-4}[dtype]
    assert (np.abs(found - rows.astype(np.float64)) <= step * largest + 2.0**-126).all()
    np.testing.assert_array_equal(form.unpack_numpy(form.pack(found)), found)


def test_float32_and_bfloat16_keep_what_they_can_hold():
    rows = normal(5, 7)
    np.testing.assert_array_equal(
        RowFormat("float32", 7).unpack_numpy(RowFormat("float32", 7).pack(rows)), rows)
    halved = rows.astype(ml_dtypes.bfloat16)
    form = RowFormat("bfloat16", 7)
    np.testing.assert_array_equal(form.pack(rows), halved.view(np.uint8))
    np.testing.assert_array_equal(form.unpack_numpy(form.pack(rows)), halved.astype(np.float32))


def test_every_fp8_byte_with_every_scale():
    """Foreign files hold what they like: all 65,536 pairs, NaNs, overflow and underflow."""
    values, scales = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    packed = np.stack([values.reshape(-1), scales.reshape(-1)], axis=-1)
    form = RowFormat("fp8", 1)
    found = form.unpack_numpy(packed)[:, 0]
    np.testing.assert_array_equal(bits(jax.jit(form.unpack)(packed))[:, 0], bits(found))
    for value, scale, expected in ((0x38, 127, 1.0), (0xB8, 128, -2.0), (0x7E, 126, 224.0),
                                   (0x01, 127, 2.0**-9), (0x7F, 3, np.nan), (0x38, 255, np.nan),
                                   (0x7E, 254, np.inf), (0x38, 0, 0.0), (0x38, 1, 2.0**-126)):
        np.testing.assert_array_equal(found[scale * 256 + value], np.float32(expected))
    normal_range = (scales >= 20) & (scales <= 240) & (values & 127 != 127)
    native = values.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.exp2(
        scales.astype(np.float64) - 127)
    np.testing.assert_array_equal(found.reshape(256, 256)[normal_range], native[normal_range])


def test_fp8_scales_are_the_least_that_fit_and_those_of_zeros_are_one():
    rows = np.zeros((4, 70), np.float32)
    rows[0, 3], rows[1, 40], rows[2, 69], rows[3, 0] = 448, -449, 1.75 * 2**-20, 2.0**-140
    scales = RowFormat("fp8", 70).pack(rows)[:, 70:].astype(int) - 127
    np.testing.assert_array_equal(
        scales, [[0, 0, 0], [0, 1, 0], [0, 0, -28], [-126, 0, 0]])


def test_the_largest_numbers_stay_finite_or_are_refused():
    largest = np.full((1, 4), np.finfo(np.float32).max, np.float32)
    for dtype in ("float32", "int8"):
        form = RowFormat(dtype, 4)
        assert np.isfinite(form.unpack_numpy(form.pack(largest))).all()
    for dtype, limit in (("bfloat16", 2.0**128 - 2.0**119), ("fp8", 2.0**128 - 2.0**123)):
        form = RowFormat(dtype, 4)
        below = np.nextafter(np.full((1, 4), limit, np.float32), np.float32(0))
        assert np.isfinite(form.unpack_numpy(form.pack(below))).all()
        with pytest.raises(UserError, match=rf"entry = 3\.\d+e\+38: is too large for {dtype}"):
            form.pack(np.full((1, 4), limit, np.float32))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_refused(dtype, bad):
    rows = np.zeros((3, 5), np.float32)
    rows[1, 2] = bad
    with pytest.raises(UserError, match=f"entry of row 1 of 3 = {bad}: must be finite"):
        RowFormat(dtype, 5).pack(rows)


def test_bad_formats_and_shapes_are_refused():
    with pytest.raises(UserError, match="dtype = 'fp4': must be one of float32, bfloat16"):
        RowFormat("fp4", 8)
    with pytest.raises(UserError, match="dim = 0: must be a whole number, at least 1"):
        RowFormat("fp8", 0)
    with pytest.raises(UserError, match=r"rows.shape = \(2, 8\): must be \[U, 9\]"):
        RowFormat("fp8", 9).pack(np.zeros((2, 8), np.float32))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_no_rows(dtype):
    form = RowFormat(dtype, 40)
    packed = form.pack(np.zeros((0, 40), np.float32))
    assert packed.shape == (0, form.row_bytes)
    assert form.unpack_numpy(packed).shape == form.unpack(jnp.asarray(packed)).shape == (0, 40)
