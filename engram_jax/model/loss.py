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

# More logits than this are made chunk by chunk: 512 MiB of float32, about 1,000 tokens of the
# paper's vocabulary. A chunk's backward pass takes a few times as much.
MAX_LOGITS = 2**27
# In training each chunk also reads and writes the gradient of the head's weight, for which few
# tokens take longer than their products. So there a chunk has up to `LARGEST` times as many, 2 GiB
# of logits, but no more than one of `CHUNKS` of a device's tokens, whose activations are as large.
LARGEST, CHUNKS = 4, 32


@jax.named_scope("loss")
def token_losses(
    params: dict[str, Any], x_BTMD: jax.Array, targets_BT: jax.Array, config: ModelConfig
) -> jax.Array:
    """Cross-entropy of every target in nats, float32 [B, T].

    Beyond `MAX_LOGITS` the logits are computed chunk after chunk of tokens. A gradient computes
    them once more, and adds that of the head's weight up in its own dtype: better take that of
    `mean_token_loss`.

    Args:
      params: what `transformer.head` reads: final_gain, and head or embedding.
      x_BTMD: streams after the last block; on a mesh, this device's part.
      targets_BT: int32.
      config: the model.
    """
    losses_BT: jax.Array = _by_chunks(cross_entropy, params, x_BTMD, targets_BT, config)
    return losses_BT


@jax.named_scope("loss")
def mean_token_loss(
    params: dict[str, Any], x_BTMD: jax.Array, targets_BT: jax.Array, config: ModelConfig
) -> jax.Array:
    """The mean of `token_losses`, a float32 scalar; arguments as there.

    Beyond `MAX_LOGITS` its gradient is made chunk after chunk with the logits, which are made once,
    and that of the head's weight adds up in float32.
    """
    size = targets_BT.size
    if size * config.vocab_size <= MAX_LOGITS:
        return jnp.mean(token_losses(params, x_BTMD, targets_BT, config))
    tokens = _at_a_time(config)
    tokens = min(max(tokens, size // CHUNKS), LARGEST * tokens)
    total: jax.Array = _sum_of_chunks(
        config, params, _chunks(x_BTMD.reshape(size, *x_BTMD.shape[2:]), tokens),
        _chunks(targets_BT.reshape(size), tokens), _chunks(jnp.ones(size), tokens))
    return total / size


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
    tokens = _at_a_time(config)

    def chunk(params: dict[str, Any], x_NMD: jax.Array, targets_N: jax.Array) -> Any:
        logits_1NV = transformer.head(params, x_NMD[None], config)
        return jax.tree.map(lambda one: one[0], of(logits_1NV, targets_N[None]))

    parts = (_chunks(x_BTMD.reshape(-1, *x_BTMD.shape[2:]), tokens),
             _chunks(targets_BT.reshape(-1), tokens))
    made_CN = jax.lax.map(lambda part: jax.checkpoint(chunk)(params, *part), parts)
    return jax.tree.map(
        lambda one: one.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape), made_CN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(
    config: ModelConfig, params: dict[str, Any], x_CNMD: jax.Array, targets_CN: jax.Array,
    weights_CN: jax.Array,
) -> jax.Array:
    """The weighted sum of the losses of one chunk after another.

    Its gradient but for a factor is known with the loss itself, so it is made with it: the logits
    are made once. Gradients of `params` add up over the chunks in float32.
    """
    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _of_chunk(config, params, *part), None

    return jax.lax.scan(add, jnp.float32(0), (x_CNMD, targets_CN, weights_CN))[0]


def _of_chunk(
    config: ModelConfig, params: dict[str, Any], x_NMD: jax.Array, targets_N: jax.Array,
    weights_N: jax.Array,
) -> jax.Array:
    logits_1NV = transformer.head(params, x_NMD[None], config)
    return jnp.sum(cross_entropy(logits_1NV, targets_N[None])[0] * weights_N)


def _with_gradients(
    config: ModelConfig, params: dict[str, Any], x_CNMD: jax.Array, targets_CN: jax.Array,
    weights_CN: jax.Array,
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, Any], jax.Array]]:
    made = jax.value_and_grad(functools.partial(_of_chunk, config), argnums=(0, 1))

    def add(carry: Any, part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, sums = carry
        loss, (of_params, of_x_NMD) = made(params, *part)
        return (total + loss, jax.tree.map(jnp.add, sums, of_params)), of_x_NMD

    start = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), params)
    (total, sums), grads_CNMD = jax.lax.scan(
        add, (jnp.float32(0), start), (x_CNMD, targets_CN, weights_CN))
    return total, (params, sums, grads_CNMD)


def _scaled(
    config: ModelConfig, saved: tuple[dict[str, Any], dict[str, Any], jax.Array], grad: jax.Array
) -> tuple[dict[str, Any], jax.Array, None, None]:
    params, sums, grads_CNMD = saved
    return (jax.tree.map(lambda total, weight: (grad * total).astype(weight.dtype), sums, params),
            (grad * grads_CNMD.astype(jnp.float32)).astype(grads_CNMD.dtype), None, None)


_sum_of_chunks.defvjp(_with_gradients, _scaled)


def _at_a_time(config: ModelConfig) -> int:
    """Tokens of a chunk of which no gradient is made."""
    return max(1, MAX_LOGITS // config.vocab_size)


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
