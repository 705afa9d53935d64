"""bfloat16 tables as uint16 bits: exact decoding, stochastic rounding, the bits that decide it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.tables import rounding

BITS = np.arange(2**16, dtype=np.uint16)  # every bfloat16
FINITE = (BITS & 0x7F80) != 0x7F80


def floats(bits32):
    return np.asarray(bits32, np.uint32).view(np.float32)


def encode(values, ids=None, step=1):
    """Bits of `values` [N, 1]; row n has id n unless `ids` says otherwise."""
    ids = jnp.arange(len(values)) if ids is None else ids
    return np.asarray(rounding.encode(jnp.asarray(values), jnp.uint16, ids, jnp.int32(step)))


def as_table_bits(x):
    """The float32 numbers whose upper half is the given bfloat16."""
    return floats(x.astype(np.uint32) << 16)


def test_storage():
    assert rounding.storage("float32") == jnp.float32
    assert rounding.storage("bfloat16") == jnp.uint16


def test_every_bfloat16_is_decoded_exactly_and_encoded_to_itself():
    """NaNs stay NaNs: a signalling one becomes quiet."""
    decoded = np.asarray(rounding.decode(jnp.asarray(BITS)))
    assert decoded.tobytes() == as_table_bits(BITS).tobytes()
    expected = jax.lax.bitcast_convert_type(jnp.asarray(BITS), jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(decoded, expected)
    for step in range(3):
        again = encode(decoded[:, None], step=step)[:, 0]
        nan = np.isnan(decoded)
        np.testing.assert_array_equal(again[~nan], BITS[~nan])
        np.testing.assert_array_equal(again[nan], BITS[nan] | 0x40)


@pytest.mark.parametrize("low", [1, 0x7FFF, 0x8000, 0xFFFF])
def test_rounding_goes_to_a_neighbour_and_never_wraps(low):
    """Every upper half with the same lower half: magnitude down or up by one, the sign kept."""
    values = floats((BITS.astype(np.uint32) << 16) | low)
    bits = encode(values[:, None])[:, 0]
    up = bits.astype(int) - BITS
    largest = (BITS & 0x7FFF) == 0x7F7F
    assert set(up[FINITE].tolist()) <= {0, 1}
    assert not up[largest].any(), "a finite value stays finite"
    assert (np.isnan(as_table_bits(bits)) == np.isnan(values)).all(), "no NaN becomes infinite"
    assert up[FINITE].mean() == pytest.approx(low / 2**16, abs=0.01)


def test_infinities_stay():
    assert encode(np.array([[np.inf, -np.inf]], np.float32)).tolist() == [[0x7F80, 0xFF80]]


def test_float32_is_left_alone():
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    same = rounding.encode(jnp.asarray(values), jnp.float32, jnp.arange(5), jnp.int32(1))
    np.testing.assert_array_equal(same, values)
    np.testing.assert_array_equal(rounding.decode(jnp.asarray(values)), values)
    np.testing.assert_array_equal(rounding.nearest(jnp.asarray(values), jnp.float32), values)


@pytest.mark.parametrize("over", ["rows", "columns", "steps"])
@pytest.mark.parametrize("value", [1 + 2**-10, -(1 + 0.7 * 2**-7), 3.14159e-30, -123.456])
def test_the_mean_of_many_roundings_is_the_value(value, over):
    count = 40_000
    shape, ids, steps = {"rows": ((count, 1), jnp.arange(count), jnp.int32(7)),
                         "columns": ((1, count), jnp.array([12345]), jnp.int32(7)),
                         "steps": ((count, 1), jnp.full(count, 12345), None)}[over]
    values = jnp.full(shape, value, jnp.float32)
    if steps is None:
        bits = jax.vmap(lambda v, i, s: rounding.encode(v, jnp.uint16, i, s))(
            values, ids, jnp.arange(count))
    else:
        bits = rounding.encode(values, jnp.uint16, ids, steps)
    rounded = np.asarray(rounding.decode(bits), np.float64)
    low, high = rounded.min(), rounded.max()
    exact = float(np.float32(value))
    assert low < exact < high
    share = (exact - low) / (high - low)
    error = abs(rounded.mean() - exact) / (high - low)
    assert error < 5 * np.sqrt(share * (1 - share) / count)


@functools.cache
def noise(rows=64, columns=64, steps=64):
    """Random numbers of consecutive steps, rows and columns: float64 [steps, rows, columns]."""
    draw = jax.vmap(lambda step: rounding.noise(jnp.arange(rows), columns, step))
    return np.asarray(draw(jnp.arange(steps)), np.float64)


def test_noise_is_uniform():
    values = noise()
    counts, _ = np.histogram(values, bins=256, range=(0, 2**16))
    even = values.size / 256
    chi_square = np.sum((counts - even) ** 2) / even
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    bits = (values.astype(np.int64)[..., None] >> np.arange(16)) & 1
    off = np.abs(bits.reshape(-1, 16).mean(axis=0) - 0.5)
    assert (off < 5 * 0.5 / np.sqrt(values.size)).all()


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["steps", "rows", "columns"])
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 32])
def test_noise_of_neighbours_is_uncorrelated(axis, lag):
    """The numbers themselves, and the parity of each bit with each bit of its neighbour."""
    values = noise()
    near, far = (np.moveaxis(values, axis, 0)[cut].reshape(-1)
                 for cut in (slice(None, -lag), slice(lag, None)))
    limit = 5 / np.sqrt(near.size)
    assert abs(np.corrcoef(near, far)[0, 1]) < limit
    signs = [(1 - 2 * ((x.astype(np.int32)[:, None] >> np.arange(16)) & 1)).astype(np.float32)
             for x in (near, far)]
    assert np.abs(signs[0].T @ signs[1] / near.size).max() < limit


def test_noise_depends_on_the_row_id_and_not_on_its_place():
    """In any order, in any shape, and for the last ids that an int32 has."""
    ids = np.array([5, 0, 2**31 - 2, 17, 6, 1], np.int32)
    whole = np.asarray(rounding.noise(jnp.asarray(ids), 4, jnp.int32(3)))
    order = np.random.default_rng(0).permutation(6)
    np.testing.assert_array_equal(rounding.noise(ids[order], 4, jnp.int32(3)), whole[order])
    square = rounding.noise(jnp.asarray(ids.reshape(2, 3).astype(np.uint32)), 4, jnp.int32(3))
    np.testing.assert_array_equal(np.asarray(square).reshape(6, 4), whole)
    np.testing.assert_array_equal(rounding.noise(ids, 2, jnp.int32(3)), whole[:, :2])
    assert (rounding.noise(ids, 4, jnp.int32(3), salt=1) != whole).any()
    assert len(np.unique(whole)) > 20
