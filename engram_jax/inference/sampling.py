"""Logits to the next token.

Shapes: V vocabulary.
"""

import jax
import jax.numpy as jnp


def sample(logits_V: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    """The most likely token at temperature 0, else a draw from softmax(logits / temperature).

    Args:
      logits_V: float32.
      key: of the draw.
      temperature: float32 scalar, not negative.

    Returns:
      int32 scalar.
    """
    greedy = jnp.argmax(logits_V).astype(jnp.int32)
    drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)
