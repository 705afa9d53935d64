"""The small parts that every room of the model uses.

Weights are float32 and [in, out]; they are cast to the dtype of the activations where they meet.
"""

import functools
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
    product = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)
    return product.reshape(*x.shape[:-1], weight.shape[-1])


def unjoined(x: jax.Array) -> jax.Array:
    """x [..., D], for one more product with the same input that is computed alone.

    XLA on GPUs joins products of one input, for which it copies their weights beside one another
    each time. For fewer tokens than columns, as in decoding, that takes longer than the products.
    """
    if x.size >= x.shape[-1] ** 2:
        return x
    return jax.lax.platform_dependent(
        x, cuda=jax.lax.optimization_barrier, rocm=jax.lax.optimization_barrier,
        default=lambda x: x)


@jax.custom_vjp
def wide_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [in, out], kept in float32 as it was summed; gradients are those of
    `linear`, in x's dtype. What is float32 is not rounded before it is multiplied."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, weight.astype(x.dtype), precision=precision,
                      preferred_element_type=jnp.float32)


def _wide_linear_backward(
    saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(linear, *saved)[1](grad.astype(saved[0].dtype))


wide_linear.defvjp(lambda x, weight: (wide_linear(x, weight), (x, weight)), _wide_linear_backward)


def rows_of(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of an embedding, in its dtype; the gradients of a row add up in float32.

    A token may stand thousands of times in a batch, and in bfloat16 a sum of ones ends at 256.
    """
    return _rows_of(table_VD.shape, str(table_VD.dtype), table_VD, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows_of(
    shape: tuple[int, int], dtype: str, table_VD: jax.Array, ids: jax.Array
) -> jax.Array:
    del shape, dtype
    return table_VD.at[ids].get(mode="promise_in_bounds")


def _rows_of_backward(
    shape: tuple[int, int], dtype: str, ids: jax.Array, grad: jax.Array
) -> tuple[jax.Array, None]:
    total_VD = jnp.zeros(shape, jnp.float32)
    total_VD = total_VD.at[ids].add(grad.astype(jnp.float32), mode="promise_in_bounds")
    return total_VD.astype(dtype), None


# The table is not kept for the backward pass: on a mesh it has been made whole for this alone.
_rows_of.defvjp(lambda shape, dtype, table, ids: (_rows_of(shape, dtype, table, ids), ids),
                _rows_of_backward)


@jax.named_scope("rms_norm")
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


@jax.named_scope("ffn")
def ffn(params: Params, x: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x)."""
    hidden = jax.nn.silu(linear(x, params["gate"])) * linear(unjoined(x), params["up"])
    return linear(hidden, params["down"])
