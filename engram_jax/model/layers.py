"""The small parts that every room of the model uses.

Weights are float32 and [in, out]; they are cast to the dtype of the activations where they meet.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from engram_jax.model.parameters import Declared, matrix

Params = dict[str, jax.Array]


class Whole(Protocol):
    """Makes parameters whole that are split over devices, where they are about to be used."""

    def __call__(self, params: Any, *path: str | int) -> Any:
        """The subtree `params`, which is found at `path` of the model's tree, whole."""


def as_they_are(params: Any, *path: str | int) -> Any:
    """The `Whole` of parameters that are not split."""
    del path
    return params


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [in, out], in x's dtype."""
    return x @ weight.astype(x.dtype)


def rms_norm(x: jax.Array, gain: jax.Array | None, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, times `gain` (broadcast from the right), in float32.

    Returns x's dtype. `gain` None leaves it out.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if gain is not None:
        wide = wide * jnp.expand_dims(gain, range(x.ndim - gain.ndim))
    return wide.astype(x.dtype)


def ffn_parameters(key: jax.Array, width: int, hidden: int) -> Declared:
    """Weights of a gated FFN: gate and up [width, hidden], down [hidden, width]."""
    gate_key, up_key, down_key = jax.random.split(key, 3)
    return {
        "gate": matrix(gate_key, width, hidden),
        "up": matrix(up_key, width, hidden),
        "down": matrix(down_key, hidden, width),
    }


def ffn(params: Params, x: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x)."""
    hidden = jax.nn.silu(linear(x, params["gate"])) * linear(x, params["up"])
    return linear(hidden, params["down"])
