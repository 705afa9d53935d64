"""Manifold-constrained hyper-connections, mHC (arXiv 2512.24880).

x' = H_res x + H_post^T F(H_pre x) with M residual streams; the mixing matrices are computed for
each token, and H_res is doubly stochastic. One stream is the plain residual x + F(x).

Shapes: B batch, T time, M streams, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.model.layers import Params, rms_norm
from engram_jax.model.parameters import Declared, matrix, vector


def mixing_parameters(key: jax.Array, width: int, streams: int) -> Declared:
    """project [M D, 2 M + M M], bias [2 M + M M], scale [3]; nothing for one stream.

    At the start every sub-layer reads the mean of the streams, writes to all of them, and the
    streams keep to themselves.
    """
    if streams == 1:
        return {}
    pre = jnp.full(streams, -jnp.log(streams - 1.0))  # sigmoid(.) = 1 / M
    post = jnp.zeros(streams)  # 2 sigmoid(0) = 1
    keep = jnp.where(jnp.eye(streams, dtype=bool), 0.0, -8.0).reshape(-1)
    return {
        "project": matrix(key, streams * width, 2 * streams + streams * streams),
        "bias": vector(jnp.concatenate([pre, post, keep])),
        "scale": vector(jnp.full(3, 0.01)),
    }


class Mixing(NamedTuple):
    """pre_BTM, post_BTM and residual_BTMM, float32."""

    pre_BTM: jax.Array
    post_BTM: jax.Array
    residual_BTMM: jax.Array


@jax.named_scope("mixing")
def mixing(params: Params, x_BTMD: jax.Array, rounds: int, eps: float) -> Mixing:
    """The mixing matrices of each token; `rounds` of Sinkhorn normalisation."""
    streams = x_BTMD.shape[2]
    flat_BTZ = x_BTMD.reshape(*x_BTMD.shape[:2], -1)
    raw = (rms_norm(flat_BTZ, None, eps) @ params["project"].astype(x_BTMD.dtype))
    scale = jnp.repeat(params["scale"], jnp.array([streams, streams, streams * streams]),
                       total_repeat_length=raw.shape[-1])
    raw = raw.astype(jnp.float32) * scale[None, None] + params["bias"][None, None]
    pre, post, keep = jnp.split(raw, [streams, 2 * streams], axis=-1)
    residual = sinkhorn(jnp.exp(keep.reshape(*keep.shape[:2], streams, streams)), rounds)
    return Mixing(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), residual)


@jax.named_scope("sinkhorn")
def sinkhorn(positive: jax.Array, rounds: int) -> jax.Array:
    """Rounds of column, then row normalisation of positive matrices [..., M, M].

    A scan: unrolled, twenty rounds and their gradients are most of what there is to compile.
    """

    def round_(positive: jax.Array, _: None) -> tuple[jax.Array, None]:
        positive = positive / jnp.sum(positive, axis=-2, keepdims=True)
        return positive / jnp.sum(positive, axis=-1, keepdims=True), None

    return jax.lax.scan(round_, positive, length=rounds)[0]


def connect(
    params: Params,
    x_BTMD: jax.Array,
    sub_layer: Callable[[jax.Array], tuple[jax.Array, Any]],
    rounds: int,
    eps: float,
) -> tuple[jax.Array, Any]:
    """The streams after one wrapped sub-layer, which maps [B, T, D] to ([B, T, D], extra)."""
    if not params:
        out_BTD, extra = sub_layer(x_BTMD[:, :, 0])
        return x_BTMD + out_BTD[:, :, None], extra
    with jax.named_scope("hyper_connection"):
        mix = jax.checkpoint(mixing, static_argnums=(2, 3))(params, x_BTMD, rounds, eps)
        pre_BTM, post_BTM = (part.astype(x_BTMD.dtype) for part in mix[:2])
        read_BTD = jnp.einsum("btm,btmd->btd", pre_BTM, x_BTMD)
    out_BTD, extra = sub_layer(read_BTD)
    with jax.named_scope("hyper_connection"):
        # Rounded to bfloat16, H_res would not be doubly stochastic, and the streams would grow.
        kept_BTMD = jnp.einsum("btij,btjd->btid", mix.residual_BTMM, x_BTMD.astype(jnp.float32),
                               precision=jax.lax.Precision.HIGHEST).astype(x_BTMD.dtype)
        return kept_BTMD + post_BTM[..., None] * out_BTD[:, :, None], extra


def split(x_BTD: jax.Array, streams: int) -> jax.Array:
    """The embedding copied to every stream, [B, T, M, D]."""
    return jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], streams, x_BTD.shape[2]))


def merge(x_BTMD: jax.Array) -> jax.Array:
    """The sum of the streams, [B, T, D]."""
    return jnp.sum(x_BTMD, axis=2)
