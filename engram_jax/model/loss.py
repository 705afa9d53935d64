"""Final streams and targets to the loss of every token, without all logits at once.

Shapes: B batch, T time, M streams, D width, V vocabulary; C chunks of N tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.model import transformer

# More logits than this are made chunk by chunk: 256 MiB of float32, about 500 tokens of the
# paper's vocabulary. A chunk's backward pass takes a few times as much.
MAX_LOGITS = 2**26


@jax.named_scope("loss")
def token_losses(
    params: dict[str, Any], x_BTMD: jax.Array, targets_BT: jax.Array, config: ModelConfig
) -> jax.Array:
    """Cross-entropy of every target in nats, float32 [B, T].

    Beyond `MAX_LOGITS` the logits are computed chunk after chunk of tokens, and once more in the
    backward pass. The gradient of the head's weight adds up over the chunks in float32.

    Args:
      params: what `transformer.head` reads: final_gain, and head or embedding.
      x_BTMD: streams after the last block; on a mesh, this device's part.
      targets_BT: int32.
      config: the model.
    """
    losses_BT: jax.Array = _by_chunks(cross_entropy, params, x_BTMD, targets_BT, config)
    return losses_BT


class TokenScores(NamedTuple):
    """losses_BT, the cross-entropy of each target in nats, float32; best_BT, the likeliest token,
    int32 (of equal ones the first)."""

    losses_BT: jax.Array
    best_BT: jax.Array


def token_scores(
    params: dict[str, Any], x_BTMD: jax.Array, targets_BT: jax.Array, config: ModelConfig
) -> TokenScores:
    """The loss of every target, and what the model would have said; arguments as `token_losses`."""

    def of(logits_BTV: jax.Array, targets_BT: jax.Array) -> TokenScores:
        best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        return TokenScores(cross_entropy(logits_BTV, targets_BT), best_BT)

    scores: TokenScores = _by_chunks(of, params, x_BTMD, targets_BT, config)
    return scores


def _by_chunks(
    of: Callable[[jax.Array, jax.Array], Any], params: dict[str, Any], x_BTMD: jax.Array,
    targets_BT: jax.Array, config: ModelConfig,
) -> Any:
    """`of` logits and targets, whose results are [B, T], without all logits at once."""
    if targets_BT.size * config.vocab_size <= MAX_LOGITS:
        return of(transformer.head(params, x_BTMD, config), targets_BT)
    tokens = max(1, MAX_LOGITS // config.vocab_size)

    def chunk(params: dict[str, Any], x_NMD: jax.Array, targets_N: jax.Array) -> Any:
        logits_1NV = transformer.head(params, x_NMD[None], config)
        return jax.tree.map(lambda one: one[0], of(logits_1NV, targets_N[None]))

    made_CN = _each_chunk(
        chunk, params, _chunks(x_BTMD.reshape(-1, *x_BTMD.shape[2:]), tokens),
        _chunks(targets_BT.reshape(-1), tokens))
    return jax.tree.map(
        lambda one: one.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape), made_CN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each_chunk(
    chunk: Callable[..., Any], params: dict[str, Any], x_CNMD: jax.Array, targets_CN: jax.Array
) -> Any:
    """`chunk` of one chunk after another; in the backward pass computed anew, and gradients of
    `params` add up over the chunks in float32."""
    _, made_CN = jax.lax.scan(
        lambda _, part: (None, chunk(params, *part)), None, (x_CNMD, targets_CN))
    return made_CN


def _each_chunk_backward(
    chunk: Callable[..., Any], saved: tuple[dict[str, Any], jax.Array, jax.Array], grads_CN: Any
) -> tuple[dict[str, Any], jax.Array, None]:
    params, x_CNMD, targets_CN = saved

    def add(sums: dict[str, Any], part: tuple[jax.Array, ...]) -> tuple[dict[str, Any], jax.Array]:
        x_NMD, targets_N, grads_N = part
        _, back = jax.vjp(lambda params, x_NMD: chunk(params, x_NMD, targets_N), params, x_NMD)
        of_params, of_x_NMD = back(grads_N)
        return jax.tree.map(lambda total, one: total + one, sums, of_params), of_x_NMD

    start = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), params)
    # From the last to the first, as `jax.lax.scan` does it.
    sums, grads_CNMD = jax.lax.scan(add, start, (x_CNMD, targets_CN, grads_CN), reverse=True)
    return (jax.tree.map(lambda total, weight: total.astype(weight.dtype), sums, params),
            grads_CNMD, None)


_each_chunk.defvjp(
    lambda chunk, params, x, targets: (_each_chunk(chunk, params, x, targets),
                                       (params, x, targets)), _each_chunk_backward)


def _chunks(array: jax.Array, limit: int) -> jax.Array:
    """The first axis cut into the fewest chunks of at most `limit`, as even as may be; zeros fill
    the last."""
    size = array.shape[0]
    count = -(-size // limit)
    each = -(-size // count)
    padded = jnp.pad(array, [(0, count * each - size)] + [(0, 0)] * (array.ndim - 1))
    return padded.reshape(count, each, *array.shape[1:])


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], float32 [B, T].

    The target's logit is picked by a masked sum: its gradient then fuses with the softmax's, where
    that of an indexed read is a scatter into an array of the logits' size.
    """
    vocabulary_11V = jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32)[None, None]
    hit_BTV = vocabulary_11V == targets_BT[..., None]
    picked_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
