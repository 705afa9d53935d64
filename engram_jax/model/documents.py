"""Where documents begin inside packed sequences.

Shapes: B batch, T time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Documents(NamedTuple):
    """Document number and position in it of each token, both int32 [B, T].

    A sequence that begins in the middle of a document counts its positions from there.
    """

    number_BT: jax.Array
    position_BT: jax.Array


def documents(starts_BT: jax.Array) -> Documents:
    """Documents from bool [B, T] marks of each document's first token."""
    time_T = jnp.arange(starts_BT.shape[1], dtype=jnp.int32)
    start_BT = jax.lax.cummax(jnp.where(starts_BT, time_T[None], 0), axis=1)
    return Documents(jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), time_T[None] - start_BT)
