"""Logits to the next token.

Shapes: B sequences, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How each sequence's tokens are drawn.

    Attributes:
      temperature_B: float32; 0 takes the likeliest token.
      top_k_B: int32; only the so many likeliest are drawn from; 0 is all.
      top_p_B: float32; of those, only the likeliest that together have this share of their
        probability; 1 is all.
      seed_B: uint32, of the draws.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    seed_B: jax.Array


def sample(
    logits_BV: jax.Array, sampling: Sampling, number_B: jax.Array, greedy: bool = False
) -> jax.Array:
    """The next token of each sequence, int32 [B].

    A draw depends on the sequence's seed and its token's number alone, not on its neighbours.

    Args:
      logits_BV: float32.
      sampling: settings.
      number_B: int32, the position of the token that is drawn.
      greedy: every temperature is 0, which spares the sorting. The host knows it: a branch in the
        program would be a wait for the device where that is a GPU.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if greedy:
        return greedy_B
    drawn_B = _draw(logits_BV, sampling, number_B)
    return jnp.where(sampling.temperature_B > 0, drawn_B, greedy_B)


def _draw(logits_BV: jax.Array, sampling: Sampling, number_B: jax.Array) -> jax.Array:
    """A draw from softmax(logits / temperature) among the tokens that are left, int32 [B]."""
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    scaled_BV = sorted_BV / jnp.maximum(sampling.temperature_B, 1e-6)[:, None]
    rank_1V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)[None]
    top_k_B1, top_p_B1 = sampling.top_k_B[:, None], sampling.top_p_B[:, None]
    scaled_BV = jnp.where((rank_1V < top_k_B1) | (top_k_B1 == 0), scaled_BV, -jnp.inf)
    chance_BV = jax.nn.softmax(scaled_BV, axis=-1)
    before_BV = jnp.cumsum(chance_BV, axis=-1) - chance_BV
    left_BV = (before_BV < top_p_B1) | (rank_1V == 0)

    def one(seed: jax.Array, number: jax.Array, scaled_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return jax.random.categorical(key, scaled_V)

    picked_B = jax.vmap(one)(
        sampling.seed_B, number_B, jnp.where(left_BV, scaled_BV, -jnp.inf))
    return jnp.take_along_axis(order_BV, picked_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
