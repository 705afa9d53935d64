"""How a row lies in host memory and on disk, and travels: packed bytes, decoded on the device.

    float32    D * 4 bytes, as they are
    bfloat16   D * 2 bytes, rounded to nearest
    int8       D bytes, then the row's scale as 4 bytes of float32
    fp8        D bytes of e4m3, then one byte of e8m0 for each 32 columns: 2^(e - 127), 255 is NaN

All little-endian. fp8 is DeepSeek-V4.1's format (docs/spec.md (22)). Decoding gives the same
float32 bits from NumPy and from every compiled program: powers of two are added to the exponent,
and an int8 scale has so few bits that its products are exact, so that fusing them with what follows
changes nothing. Values below 2**-126 decode to zero, as most devices would have it anyhow.

Shapes: U rows (or any leading axes), D columns, B bytes of a packed row, G groups of 32 columns.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from engram_jax.config import ROW_DTYPES, require

GROUP = 32  # columns that share a scale of fp8
_BIAS = 127  # of the exponents of e8m0 and float32
_LEAST_NORMAL = np.float32(2.0**-126)
_LARGEST_FP8 = 448  # 0.875 * 2**9
_SCALE_BITS = np.uint32(0xFFFFFF00)  # of an int8 scale: 16 significant ones, so 7 more stay exact
_LARGEST_SCALE = (np.finfo(np.float32).max / np.float32(127)).view(np.uint32) & _SCALE_BITS
_INFINITY, _NAN, _SIGN = np.uint32(0x7F800000), np.uint32(0x7FC00000), np.uint32(0x80000000)


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """Says how one table packs its rows, and packs and unpacks them.

    Attributes:
      dtype: one of `ROW_DTYPES`.
      dim: D, columns.

    Raises:
      UserError: a value out of range.
    """

    dtype: str
    dim: int

    def __post_init__(self) -> None:
        require(self.dtype in ROW_DTYPES, "dtype", self.dtype,
                f"must be one of {', '.join(ROW_DTYPES)}")
        require(type(self.dim) is int and self.dim >= 1, "dim", self.dim,
                "must be a whole number, at least 1")

    @property
    def groups(self) -> int:
        """G, the scales of a row of fp8."""
        return -(-self.dim // GROUP)

    @property
    def row_bytes(self) -> int:
        """B, bytes of a packed row with its scales."""
        return {"float32": 4 * self.dim, "bfloat16": 2 * self.dim, "int8": self.dim + 4,
                "fp8": self.dim + self.groups}[self.dtype]

    def pack(self, rows_UD: np.ndarray) -> np.ndarray:
        """Pack rows float32 [U, D] as uint8 [U, B], rounded to nearest.

        Raises:
          UserError: another shape; a value that is not finite, or not any more when it is rounded.
        """
        require(rows_UD.ndim == 2 and rows_UD.shape[1] == self.dim, "rows.shape", rows_UD.shape,
                f"must be [U, {self.dim}]")
        rows_UD = np.ascontiguousarray(rows_UD, np.float32)
        _require_finite(rows_UD)
        match self.dtype:
            case "float32":
                return rows_UD.view(np.uint8)
            case "bfloat16":
                return _pack_bfloat16(rows_UD)
            case "int8":
                return _pack_int8(rows_UD)
        return self._pack_fp8(rows_UD)

    def pack_stored(self, stored_UD: np.ndarray) -> np.ndarray:
        """Pack rows as tables store them (uint16 are the bits of bfloat16), as uint8 [U, B]."""
        if stored_UD.dtype == np.uint16:
            bits_UB = np.ascontiguousarray(stored_UD).view(np.uint8)
            stored_UD = RowFormat("bfloat16", self.dim).unpack_numpy(bits_UB)
        return self.pack(stored_UD)

    def unpack_numpy(self, packed_UB: np.ndarray) -> np.ndarray:
        """Unpack rows in plain NumPy to float32 [..., D]; the reference of `unpack`."""
        match self.dtype:
            case "float32":
                return np.ascontiguousarray(packed_UB).view(np.float32)
            case "bfloat16":
                bits_UD = np.ascontiguousarray(packed_UB).view(np.uint16)
                return (bits_UD.astype(np.uint32) << 16).view(np.float32)
        values_UD = np.ascontiguousarray(packed_UB[..., :self.dim])
        scales = np.ascontiguousarray(packed_UB[..., self.dim:])
        if self.dtype == "int8":
            return values_UD.view(np.int8).astype(np.float32) * scales.view(np.float32)
        return _decode_fp8(values_UD, np.repeat(scales, GROUP, axis=-1)[..., :self.dim])

    def unpack(self, packed_UB: jax.Array) -> jax.Array:
        """Unpack rows under jit, from uint8 [..., B] to float32 [..., D]."""
        match self.dtype:
            case "float32":
                return _bitcast(packed_UB, jnp.float32)
            case "bfloat16":
                return _bitcast(_bitcast(packed_UB, jnp.uint16).astype(jnp.uint32) << 16,
                                jnp.float32)
        values_UD, scales = packed_UB[..., :self.dim], packed_UB[..., self.dim:]
        if self.dtype == "int8":
            return _bitcast(values_UD, jnp.int8).astype(jnp.float32) * _bitcast(
                scales, jnp.float32)
        spread_UD = jnp.repeat(scales, GROUP, axis=-1)[..., :self.dim]
        return _scale_fp8(_bitcast(values_UD, jnp.float8_e4m3fn), spread_UD)

    def _pack_fp8(self, rows_UD: np.ndarray) -> np.ndarray:
        """Each group's scale is the least power of two with which its largest entry fits."""
        _require_fits(rows_UD, 4, self.dtype)
        padded = np.zeros((len(rows_UD), self.groups * GROUP), np.float32)
        padded[:, :self.dim] = rows_UD
        grouped_UGC = padded.reshape(len(rows_UD), self.groups, GROUP)
        fraction_UG, exponent_UG = np.frexp(np.abs(grouped_UGC).max(axis=-1, initial=0))
        power_UG = np.clip(exponent_UG - 9 + (fraction_UG > _LARGEST_FP8 / 2**9), -126, 127)
        power_UG[fraction_UG == 0] = 0
        scaled_UGC = grouped_UGC * np.ldexp(np.float32(1), -power_UG)[..., None]
        packed_UB = np.empty((len(rows_UD), self.row_bytes), np.uint8)
        packed_UB[:, :self.dim] = scaled_UGC.astype(ml_dtypes.float8_e4m3fn).view(
            np.uint8).reshape(padded.shape)[:, :self.dim]
        packed_UB[:, self.dim:] = power_UG + _BIAS
        return packed_UB


def _require_finite(rows_UD: np.ndarray) -> None:
    finite_U = np.isfinite(rows_UD).all(axis=-1)
    if not finite_U.all():
        row = int(np.argmin(finite_U))
        value = rows_UD[row][~np.isfinite(rows_UD[row])][0]
        require(False, f"entry of row {row} of {len(rows_UD)}", float(value), "must be finite")


def _pack_bfloat16(rows_UD: np.ndarray) -> np.ndarray:
    _require_fits(rows_UD, 8, "bfloat16")
    return rows_UD.astype(ml_dtypes.bfloat16).view(np.uint8)


def _require_fits(rows_UD: np.ndarray, significant: int, dtype: str) -> None:
    """Refuse what rounding to `significant` bits would make infinite."""
    largest = float(np.abs(rows_UD).max(initial=0))
    require(largest < 2.0**128 - 2.0**(127 - significant), "entry", largest,
            f"is too large for {dtype}")


def _pack_int8(rows_UD: np.ndarray) -> np.ndarray:
    """The scale is 1/127 of the row's largest entry, rounded up to 16 bits."""
    largest_U = np.abs(rows_UD).max(axis=-1, initial=0)
    bits_U = (np.maximum(largest_U / np.float32(127), _LEAST_NORMAL)).view(np.uint32)
    bits_U = np.minimum((bits_U + ~_SCALE_BITS) & _SCALE_BITS, _LARGEST_SCALE)
    bits_U[largest_U == 0] = np.float32(1).view(np.uint32)
    scale_U1 = bits_U.view(np.float32)[:, None]
    packed_UB = np.empty((len(rows_UD), rows_UD.shape[1] + 4), np.uint8)
    rounded_UD = np.clip(np.rint(rows_UD / scale_U1), -127, 127)
    packed_UB[:, :-4] = rounded_UD.astype(np.int8).view(np.uint8)
    packed_UB[:, -4:] = scale_U1.view(np.uint8)
    return packed_UB


def _decode_fp8(values_UD: np.ndarray, scales_UD: np.ndarray) -> np.ndarray:
    """float32 of e4m3 bytes and the e8m0 byte of each, by way of float64."""
    exact_UD = np.ldexp(values_UD.view(ml_dtypes.float8_e4m3fn).astype(np.float64),
                        scales_UD.astype(np.int32) - _BIAS)
    exact_UD = np.where(np.abs(exact_UD) < _LEAST_NORMAL, np.copysign(0.0, exact_UD), exact_UD)
    with np.errstate(over="ignore"):
        decoded_UD = exact_UD.astype(np.float32)
    decoded_UD[np.isnan(exact_UD) | (scales_UD == 255)] = np.float32(np.nan)
    return decoded_UD


def _bitcast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The bits of `x` as another dtype; a wider one takes up its bytes from the last axis."""
    narrow, wide = x.dtype.itemsize, jnp.dtype(dtype).itemsize
    if wide > narrow:
        x = x.reshape(*x.shape[:-1], x.shape[-1] * narrow // wide, wide // narrow)
    return jax.lax.bitcast_convert_type(x, dtype)


def _scale_fp8(values_UD: jax.Array, scales_UD: jax.Array) -> jax.Array:
    """e4m3 values times 2^(scale - 127), by whole-number arithmetic on the bits of float32."""
    bits_UD = _bitcast(values_UD.astype(jnp.float32), jnp.uint32)
    sign_UD, magnitude_UD = bits_UD & _SIGN, bits_UD & ~_SIGN
    power_UD = scales_UD.astype(jnp.int32) - _BIAS
    exponent_UD = (magnitude_UD >> 23).astype(jnp.int32) + power_UD
    scaled_UD = magnitude_UD + (power_UD.astype(jnp.uint32) << 23)
    scaled_UD = jnp.where(exponent_UD > 254, _INFINITY, scaled_UD)
    scaled_UD = jnp.where((exponent_UD < 1) | (magnitude_UD == 0), 0, scaled_UD)
    nan_UD = (magnitude_UD > _INFINITY) | (scales_UD == 255)
    return _bitcast(jnp.where(nan_UD, _NAN, sign_UD | scaled_UD), jnp.float32)
