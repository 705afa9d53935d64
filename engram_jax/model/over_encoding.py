"""OverEncoding, the baseline memory: n-gram rows averaged into the input embedding.

(E0(x_t) + sum_{n,k} W_{n,k} E_{n,k}[row]) / (1 + (N-1) K)  (arXiv 2501.16975).
Shapes: B batch, T time, H = (N - 1) * K sub-tables, C = D / H columns of a row, D width.
"""

import jax
import jax.numpy as jnp

from engram_jax.config import OverEncodingConfig
from engram_jax.model.layers import Params
from engram_jax.model.parameters import Declared, matrix


def over_encoding_parameters(
    key: jax.Array, width: int, config: OverEncodingConfig
) -> Declared:
    """project [H, C, D]."""
    heads = config.total_heads
    return {"project": matrix(key, heads, width // heads, width)}


@jax.named_scope("over_encoding")
def encode(params: Params, embedded_BTD: jax.Array, rows_BTHC: jax.Array) -> jax.Array:
    """The averaged embedding, [B, T, D], in embedded's dtype."""
    heads = rows_BTHC.shape[2]
    rows = rows_BTHC.astype(embedded_BTD.dtype)
    added_BTD = jnp.einsum("bthc,hcd->btd", rows, params["project"].astype(rows.dtype))
    return (embedded_BTD + added_BTD) / (1 + heads)
