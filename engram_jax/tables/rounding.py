"""How a table stores its rows: float32 as they are, bfloat16 as uint16 bits.

Bits, because XLA on CPUs writes into a bfloat16 table by way of a float32 copy of the whole table,
and into a uint16 table in place. Rounding to nearest would lose every update of less than half of
the last of 8 bits (1/512 of the entry), so an update is rounded stochastically: up with a
probability that is the share of the way up, and so right on average.

Shapes: U rows (or any leading axes), D columns.
"""

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require

SALT = 0x656E6772
_STORAGE = {"float32": jnp.float32, "bfloat16": jnp.uint16}
_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 over the golden ratio: spreads successive numbers
_INFINITY = np.uint32(0x7F800000)
_LARGEST = np.uint32(0x7F7F)  # the largest finite bfloat16
_QUIET = np.uint32(0x40)  # keeps a NaN a NaN when its low bits go


def storage(dtype: str) -> jnp.dtype:
    """The dtype of the array that holds a table of `dtype`, "float32" or "bfloat16".

    Raises:
      UserError: another dtype.
    """
    require(dtype in _STORAGE, "dtype", dtype, "must be float32 or bfloat16")
    return jnp.dtype(_STORAGE[dtype])


def decode(stored: jax.Array) -> jax.Array:
    """float32 values of stored ones, exactly."""
    if stored.dtype == jnp.float32:
        return stored
    return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)


def nearest(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 `values` as a table of storage `dtype` holds them, rounded to nearest."""
    if dtype == jnp.float32:
        return values
    return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)


def encode(
    values_UD: jax.Array, dtype: jnp.dtype, ids_U: jax.Array, number: jax.Array, salt: int = SALT
) -> jax.Array:
    """float32 values as a table of storage `dtype` holds them, rounded stochastically.

    16 random bits are added to the 16 that go. A value that bfloat16 has is kept; a finite one
    stays finite; infinities and NaNs stay what they are; the sign does not matter.

    Args:
      values_UD: float32, [..., D].
      ids_U: integers [...], the rows' ids in the whole table; they, the column, the update's
        `number` and `salt` choose the random bits, so these depend neither on the mesh nor on the
        order of rows.
    """
    if dtype == jnp.float32:
        return values_UD
    bits_UD = jax.lax.bitcast_convert_type(values_UD, jnp.uint32)
    magnitude_UD, sign_UD = bits_UD & 0x7FFFFFFF, (bits_UD >> 16) & 0x8000
    rounded_UD = (magnitude_UD + noise(ids_U, values_UD.shape[-1], number, salt)) >> 16
    special_UD = (magnitude_UD >> 16) | jnp.where(magnitude_UD > _INFINITY, _QUIET, 0)
    kept_UD = jnp.where(
        magnitude_UD < _INFINITY, jnp.minimum(rounded_UD, _LARGEST), special_UD)
    return (kept_UD | sign_UD).astype(jnp.uint16)


def noise(ids_U: jax.Array, columns: int, number: jax.Array, salt: int = SALT) -> jax.Array:
    """Random numbers below 2**16, uint32 [..., D], a pure function of its arguments."""
    row_U = _mix(ids_U.astype(jnp.uint32) ^ _mix(jnp.asarray(number).astype(jnp.uint32) ^ salt))
    column_D = jnp.arange(columns, dtype=jnp.uint32) * _GOLDEN
    return _mix(row_U[..., None] + column_D.reshape((1,) * row_U.ndim + (-1,))) >> 16


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of `x` flips each bit of the result half the time.

    The constants are C. Wellons' "lowbias32" (hash-prospector), found by search for least bias.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
