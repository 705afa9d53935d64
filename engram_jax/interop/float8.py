"""Weights in fp8 with a scale for each block, decoded to the bit in NumPy.

e4m3 has no infinities, and NaN where all bits but the sign are set; e8m0 is a power of two and
nothing else, 2^(e - 127) with 255 as NaN. The product of both is exact in float32 down to its last
subnormal bit, so nothing is rounded but what float32 cannot hold.

Shapes: R rows, C columns of a weight.
"""

import ml_dtypes
import numpy as np

from engram_jax.config import require

_BIAS, _NAN = 127, 255


def decode_e8m0(bytes_: np.ndarray) -> np.ndarray:
    """float32 of e8m0 bytes: 0 is 2^-127, which is subnormal, and 255 is NaN."""
    exponents = np.asarray(bytes_, np.uint8).astype(np.int32)
    powers = np.ldexp(np.float32(1), np.minimum(exponents, _NAN - 1) - _BIAS)
    return np.where(exponents == _NAN, np.float32(np.nan), powers)


def decode_blocks(weight_RC: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [R, C] of e4m3 values and the e8m0 byte of each block.

    Args:
      weight_RC: e4m3 values, or their bytes.
      scale: uint8 [R / r, C / c] for blocks of r rows and c columns.

    Raises:
      UserError: blocks that do not divide the weight.
    """
    rows, columns = weight_RC.shape
    fits = scale.ndim == 2 and all(scale.shape) and rows % scale.shape[0] == 0 == (
        columns % scale.shape[1])
    require(fits, "scale.shape", scale.shape, f"must divide the weight's {weight_RC.shape}")
    height, width = rows // scale.shape[0], columns // scale.shape[1]
    values = weight_RC.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    blocks = values.reshape(scale.shape[0], height, scale.shape[1], width)
    with np.errstate(over="ignore"):
        blocks = blocks * decode_e8m0(scale)[:, None, :, None]
    return blocks.reshape(rows, columns)
