"""Manifold-constrained hyper-connections, mHC (arXiv 2512.24880).

x' = H_res x + H_post^T F(H_pre x) with M residual streams; the mixing matrices are computed for
each token, and H_res is doubly stochastic. One stream is the plain residual x + F(x).

Streams are one array [B, T, M, D], or apart: a tuple of M arrays [B, T, D]. A TPU keeps the last
two axes of an array in tiles of 8 x 128, which M x D fits badly, so the compiler lays one array out
in several ways and copies between them. `stream_layout` says which it is.

Shapes: B batch, T time, M streams, D width; N tokens, Z = M * D, X = 2 M + M M.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from engram_jax.config import ModelConfig
from engram_jax.model.layers import Params, rms_norm, wide_linear
from engram_jax.model.parameters import Declared, matrix, vector

FEW_TOKENS = 256  # up to so many, as in decoding, Sinkhorn on GPUs has a way of its own
# Of logits of H_res: the largest of a column that stays as it is, and how far below it others
# count. Gradients may be divided by a row's sum and twice by a column's: exp(40 + 2 20) is 6e34.
MOVED, FURTHEST = 20.0, 40.0
# By the names of `jax.checkpoint`: what mixes the streams, and what a sub-layer gave.
MIXING, OUTPUT = "mixing", "output"

Apart = tuple[jax.Array, ...]  # M times [B, T, D]
Streams = TypeVar("Streams", jax.Array, Apart)


def stream_layout(config: ModelConfig, device: jax.Device) -> str:
    """How streams lie between blocks on a device: "joined" or "apart".

    "auto" is apart on TPUs, where by the compiler's estimate what mixes streams takes less than
    half of the time; nothing of it was run on one.
    """
    if config.stream_layout == "auto":
        return "apart" if device.platform == "tpu" and config.streams > 1 else "joined"
    return config.stream_layout


def laid_out(x_BTMD: jax.Array, layout: str) -> jax.Array | Apart:
    """The streams as `layout` wants them; `joined` is the way back."""
    return x_BTMD if layout == "joined" else _apart(x_BTMD)


def _apart(x_BTMD: jax.Array) -> Apart:
    return tuple(x_BTMD[:, :, m] for m in range(x_BTMD.shape[2]))


def joined(x: jax.Array | Apart) -> jax.Array:
    """The streams as one array, [B, T, M, D]."""
    return jnp.stack(x, axis=2) if isinstance(x, tuple) else x


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
    raw_BTX = _by_device(functools.partial(_projected, eps),
                         functools.partial(_projected_at_once, eps))(flat_BTZ, params["project"])
    return _of_logits(params, raw_BTX, streams, rounds)


def _of_logits(params: Params, raw_BTX: jax.Array, streams: int, rounds: int) -> Mixing:
    """The matrices, of the normalised streams times the projection."""
    scale = jnp.repeat(params["scale"], jnp.array([streams, streams, streams * streams]),
                       total_repeat_length=raw_BTX.shape[-1])
    raw_BTX = raw_BTX * scale[None, None] + params["bias"][None, None]
    pre, post, keep = jnp.split(raw_BTX, [streams, 2 * streams], axis=-1)
    residual = sinkhorn(keep.reshape(*keep.shape[:2], streams, streams), rounds)
    return Mixing(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), residual)


@jax.named_scope("mixing")
def _mixing_apart(
    params: Params, x: Apart, rounds: int, eps: float
) -> Mixing:
    """`mixing` of streams that lie apart.

    The product and the sum of squares, 2 M + M M + 1 numbers a token, are kept for the backward
    pass as the matrices are: making them anew would read all streams.
    """
    width = x[0].shape[-1]
    projects = (params["project"][m * width: (m + 1) * width] for m in range(len(x)))
    raw_BTX = _added(wide_linear(x_BTD, project)
                     for x_BTD, project in zip(x, projects, strict=True))
    square_BT1 = _anew(_square)(x)
    raw_BTX, square_BT1 = (checkpoint_name(part, MIXING) for part in (raw_BTX, square_BT1))

    def rest(params: Params, raw_BTX: jax.Array, square_BT1: jax.Array) -> Mixing:
        norm_BT1 = jax.lax.rsqrt(square_BT1 / (len(x) * width) + eps)
        return _of_logits(params, raw_BTX * norm_BT1, len(x), rounds)

    mix = _anew(rest)(
        {name: params[name] for name in ("bias", "scale")}, raw_BTX, square_BT1)
    return _kept(mix)


def _square(x: Apart) -> jax.Array:
    """The sum of the squares of all streams, float32 [B, T, 1]."""
    return _added(jnp.sum(jnp.square(x_BTD.astype(jnp.float32)), axis=-1, keepdims=True)
                  for x_BTD in x)


# Not kept for the backward pass. The compiler may join it with whatever else reads its arguments,
# the forward pass included: kept from that, libtpu read and copied all streams once more.
_anew = functools.partial(jax.checkpoint, prevent_cse=False)


def _kept(mix: Mixing) -> Mixing:
    """The same, kept for the backward pass."""
    return Mixing(*(checkpoint_name(part, MIXING) for part in mix))


def _projected(eps: float, flat_BTZ: jax.Array, project: jax.Array) -> jax.Array:
    """The normalised streams times `project`, float32."""
    normed_BTZ = rms_norm(flat_BTZ, None, eps)
    return (normed_BTZ @ project.astype(flat_BTZ.dtype)).astype(jnp.float32)


def _projected_at_once(eps: float, flat_BTZ: jax.Array, project: jax.Array) -> jax.Array:
    """The same, divided by the norm afterwards: what is normalised is never in memory."""
    wide = flat_BTZ.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return wide_linear(flat_BTZ, project) * jax.lax.rsqrt(square + eps)


@jax.named_scope("sinkhorn")
def sinkhorn(logits: jax.Array, rounds: int) -> jax.Array:
    """Rounds of column, then row normalisation of exp(logits), [..., M, M] float32.

    Logits may be of any size: see `_positive`.

    A scan: unrolled, twenty rounds and their gradients are most of what there is to compile. The
    tokens come last: a TPU keeps the last two axes in tiles of 8 x 128, and a CPU goes along the
    last one. A GPU starts some kernels for each round of a scan, which take longer than their work:
    half of all that a step of four streams started. There rounds are unrolled, with sums that need
    no kernels of their own; for few tokens, as in decoding, in a way whose gradient would take
    minutes to compile.
    """
    few = logits[..., 0, 0].size <= FEW_TOKENS
    default, on_gpus = (functools.partial(way, rounds) for way in (
        _rounds, _rounds_of_entries if few else _rounds_unrolled))
    return _by_device(default, default, on_gpus)(logits)


def _positive(logits: jax.Array, axis: int) -> jax.Array:
    """exp(logits) as Sinkhorn's gradient in float32 can take it; `axis` is that of the rows.

    The gradient of a quotient has the square of the sum that it is divided by, which is 0 or
    infinite where the largest logit of a column is beyond 44, far before exp itself is, and may
    have been divided by the small sum of a row before. Columns are divided by their sums first, so
    one whose largest logit is beyond `MOVED` is moved to where that is 0, which changes no result
    after a round. What is further than `FURTHEST` below the largest of its column counts as no
    further: a row of such entries alone would have a sum that is too small. Other logits keep their
    bits.
    """
    rows = (jax.lax.index_in_dim(logits, row, axis) for row in range(logits.shape[axis]))
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, rows))
    shift = jnp.where(jnp.abs(top) > MOVED, top, 0)  # whole: of 1e9 the 40 less is no other float
    return jnp.exp(jnp.maximum(logits - shift, top - shift - FURTHEST))


def _by_device(
    default: Callable[..., Any], on_tpus: Callable[..., Any],
    on_gpus: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """What computes the same in a device's own way; GPUs have that of TPUs where none is named."""
    on_gpus = on_gpus or on_tpus
    return lambda *arguments: jax.lax.platform_dependent(
        *arguments, tpu=on_tpus, cuda=on_gpus, rocm=on_gpus, default=default)


def _rounds(rounds: int, logits: jax.Array) -> jax.Array:
    def round_(positive_MMN: jax.Array, _: None) -> tuple[jax.Array, None]:
        positive_MMN = positive_MMN / jnp.sum(positive_MMN, axis=0, keepdims=True)
        return positive_MMN / jnp.sum(positive_MMN, axis=1, keepdims=True), None

    positive_MMN = _positive(_lanes(logits), 0)
    return _from_lanes(jax.lax.scan(round_, positive_MMN, length=rounds)[0], logits.shape)


def _rounds_unrolled(rounds: int, logits: jax.Array) -> jax.Array:
    positive_MMN, streams = _positive(_lanes(logits), 0), logits.shape[-1]
    for _ in range(rounds):
        column_MN = functools.reduce(jnp.add, (positive_MMN[m] for m in range(streams)))
        positive_MMN = positive_MMN / column_MN[None]
        row_MN = functools.reduce(jnp.add, (positive_MMN[:, m] for m in range(streams)))
        positive_MMN = positive_MMN / row_MN[:, None]
    return _from_lanes(positive_MMN, logits.shape)


def _rounds_of_entries(rounds: int, logits: jax.Array) -> jax.Array:
    """The same as factors of rows and columns, with an array for each entry of the matrices, which
    XLA on GPUs makes in two kernels."""
    flat_NMM = _positive(logits.reshape(-1, *logits.shape[-2:]), 1)
    streams = range(logits.shape[-1])
    entry_N = [[flat_NMM[:, i, j] for j in streams] for i in streams]
    row_N = column_N = [jnp.ones_like(entry_N[0][0]) for _ in streams]
    for _ in range(rounds):
        column_N = [1 / functools.reduce(jnp.add, (entry_N[i][j] * row_N[i] for i in streams))
                    for j in streams]
        row_N = [1 / functools.reduce(jnp.add, (entry_N[i][j] * column_N[j] for j in streams))
                 for i in streams]
    scale_NMM = jnp.stack(row_N, -1)[:, :, None] * jnp.stack(column_N, -1)[:, None]
    return (flat_NMM * scale_NMM).reshape(logits.shape)


def _lanes(logits: jax.Array) -> jax.Array:
    """[..., M, M] with the tokens last, [M, M, N]."""
    return jnp.moveaxis(logits.reshape(-1, *logits.shape[-2:]), 0, -1)


def _from_lanes(positive_MMN: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.moveaxis(positive_MMN, -1, 0).reshape(shape)


def connect(
    params: Params,
    x: Streams,
    sub_layer: Callable[[jax.Array], tuple[jax.Array, Any]],
    rounds: int,
    eps: float,
    output: str = OUTPUT,
) -> tuple[Streams, Any]:
    """The streams after one wrapped sub-layer, which maps [B, T, D] to ([B, T, D], extra).

    They lie as they did. `output` is the name by which what the sub-layer gave may be kept.
    """
    if not params:
        assert not isinstance(x, tuple), "one stream is an array"
        out_BTD, extra = sub_layer(x[:, :, 0])
        return x + checkpoint_name(out_BTD, output)[:, :, None], extra
    with jax.named_scope("hyper_connection"):
        if isinstance(x, tuple):
            mix = _mixing_apart(params, x, rounds, eps)
            read_BTD = _read_as_sum(mix.pre_BTM, x)
        else:
            mix = _kept(jax.checkpoint(mixing, static_argnums=(2, 3))(params, x, rounds, eps))
            read_BTD = _by_device(_read, _read_joined)(mix.pre_BTM.astype(x.dtype), x)
    out_BTD, extra = sub_layer(read_BTD)
    out_BTD = checkpoint_name(out_BTD, output)
    with jax.named_scope("hyper_connection"):
        if isinstance(x, tuple):
            return _written_as_sums(mix.residual_BTMM, mix.post_BTM, x, out_BTD), extra
        return _by_device(_written, _written_joined)(
            mix.residual_BTMM, mix.post_BTM.astype(x.dtype), x, out_BTD), extra


def _read(pre_BTM: jax.Array, x_BTMD: jax.Array) -> jax.Array:
    """What a sub-layer reads of the streams, [B, T, D]."""
    return jnp.einsum("btm,btmd->btd", pre_BTM, x_BTMD)


def _written(
    residual_BTMM: jax.Array, post_BTM: jax.Array, x_BTMD: jax.Array, out_BTD: jax.Array
) -> jax.Array:
    """The streams after it, [B, T, M, D]."""
    # Rounded to bfloat16, H_res would not be doubly stochastic, and the streams would grow.
    kept_BTMD = jnp.einsum("btij,btjd->btid", residual_BTMM, x_BTMD.astype(jnp.float32),
                           precision=jax.lax.Precision.HIGHEST).astype(x_BTMD.dtype)
    return kept_BTMD + post_BTM[..., None] * out_BTD[:, :, None]


# A product with a matrix of M x M for each token is no work for a TPU's or GPU's matrix unit: as
# sums of M streams it is elementwise, in float32, and reads and writes the streams once.


def _read_as_sum(pre_BTM: jax.Array, x: Apart) -> jax.Array:
    return _added(pre_BTM[:, :, m, None].astype(jnp.float32) * x_BTD.astype(jnp.float32)
                  for m, x_BTD in enumerate(x)).astype(x[0].dtype)


def _written_as_sums(
    residual_BTMM: jax.Array, post_BTM: jax.Array, x: Apart, out_BTD: jax.Array
) -> Apart:
    streams = [x_BTD.astype(jnp.float32) for x_BTD in x]
    wide_BTD = out_BTD.astype(jnp.float32)

    def stream(i: int) -> jax.Array:
        kept = (residual_BTMM[:, :, i, j, None] * x_BTD for j, x_BTD in enumerate(streams))
        given = post_BTM[:, :, i, None].astype(jnp.float32) * wide_BTD
        return functools.reduce(jnp.add, kept, given).astype(out_BTD.dtype)

    return tuple(stream(i) for i in range(len(x)))


def _read_joined(pre_BTM: jax.Array, x_BTMD: jax.Array) -> jax.Array:
    return _read_as_sum(pre_BTM, _apart(x_BTMD))


def _written_joined(
    residual_BTMM: jax.Array, post_BTM: jax.Array, x_BTMD: jax.Array, out_BTD: jax.Array
) -> jax.Array:
    return joined(_written_as_sums(residual_BTMM, post_BTM, _apart(x_BTMD), out_BTD))


def _added(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def split(x_BTD: jax.Array, streams: int) -> jax.Array:
    """The embedding copied to every stream, [B, T, M, D]."""
    return jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], streams, x_BTD.shape[2]))


def merge(x_BTMD: jax.Array) -> jax.Array:
    """The sum of the streams, [B, T, D]."""
    return jnp.sum(x_BTMD, axis=2)
