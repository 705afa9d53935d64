"""LogitLens: how far each layer's prediction is from the last layer's (nostalgebraist 2020).

Shapes: B batch, T time, V vocabulary, L blocks.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.insides.observing import Opened


@jax.jit
def divergence(last_BTV: jax.Array, logits_BTV: jax.Array) -> jax.Array:
    """KL(last || layer) of the softmaxes in nats, float32 [B, T]; 0 for equal logits."""
    last = jax.nn.log_softmax(last_BTV, axis=-1)
    layer = jax.nn.log_softmax(logits_BTV, axis=-1)
    return jnp.sum(jnp.exp(last) * (last - layer), axis=-1)


def logit_lens(opened: Opened, batches: Iterable[np.ndarray]) -> np.ndarray:
    """The mean over all positions of KL(last layer || layer), nats, float64 [L].

    A layer's streams are merged, normed and projected as the last one's are.

    Args:
      opened: the run.
      batches: raw tokens, int32 [B, T] each.
    """
    total, count = np.zeros(opened.run.model.depth), 0
    for tokens_BT in batches:
        streams = opened.observe(tokens_BT).streams[1:]
        last_BTV = opened.head(streams[-1])
        total += [float(jnp.sum(divergence(last_BTV, opened.head(x)))) for x in streams]
        count += tokens_BT.size
    return total / count
