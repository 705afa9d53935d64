"""Ids for control experiments: a memory of the same size and work that knows nothing of the text.

"More parameters help" and "these parameters help" are told apart by memories that are as large, are
read as often and learn as fast, but are asked for rows that say nothing of the text before a token.

Shapes: B batch, T time.
"""

import jax
import jax.numpy as jnp


def of_neighbours(ids_BT: jax.Array) -> jax.Array:
    """Replace each sequence's ids by those of the sequence before it in the batch.

    Rows are read as often as the memory's own; what is read belongs to another text.
    """
    assert ids_BT.shape[0] > 1, "a batch of one sequence has no neighbours"
    return jnp.roll(ids_BT, 1, axis=0)


def by_chance(ids_BT: jax.Array, size: int) -> jax.Array:
    """Draw ids below `size`, int32, that no other beginning of a sequence gets but by chance.

    The id of a position is a hash of all tokens up to it, so the same batch gives the same ids
    again, causally, and n-grams that come back do not bring their ids back.
    """
    at_1T = jnp.arange(ids_BT.shape[1], dtype=jnp.uint32)[None]
    words_BT = _mixed(ids_BT.astype(jnp.uint32) ^ _mixed(at_1T + jnp.uint32(1)))
    before_BT = jnp.cumsum(words_BT, axis=1, dtype=jnp.uint32)
    return (_mixed(before_BT) % jnp.uint32(size)).astype(jnp.int32)


def _mixed(word: jax.Array) -> jax.Array:
    """Mix the bits of a uint32: MurmurHash3's finaliser (Appleby, public domain), a bijection."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
