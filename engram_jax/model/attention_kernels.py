"""Causal attention within documents: one function, and what computes it on which device.

`xla` is plain JAX in chunks of queries: it runs anywhere, and the others are compared with it.
`splash` is the flash attention that JAX ships for TPUs, `cudnn` NVIDIA's behind
`jax.nn.dot_product_attention`. Neither ever holds the scores of a whole sequence. `splash` was
never run on a TPU by us: it is compiled for TPUs and interpreted on CPUs. `cudnn` ran alone on an
H200 and gave what the plain one gives, but a training step that calls it ended there in an
IndexError of XLA's (jax 0.11.2), so nobody gets it who does not name it.

Shapes: B batch, T time (S the attended time), H heads, X width of queries and keys, V of values.
"""

import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention

from engram_jax.config import AttentionConfig, require

# Sequences up to this length are attended to in one piece. At 32 heads and 4096 keys the scores of
# a chunk are 512 MiB of float32 for each sequence; smaller chunks take longer to compile.
QUERY_CHUNK = 1024
# Beyond so many keys chunks get smaller, and are a loop: their scores stay as many as these are.
# The loop is cut into so many parts, each against the keys up to its own end.
KEYS, PARTS = 4096, 8
# Queries and keys that splash attention's kernels have in a TPU's fast memory at a time.
SPLASH_BLOCK = 512
LANES = 128
# cuDNN takes widths up to 128, and up to 256 from this compute capability (Hopper) on.
CUDNN_WIDTH, CUDNN_WIDE, HOPPER = 128, 256, 9.0
# Bits of a document's number, so there may be 2**24 in a sequence, and by how many nats at least
# the scores of two documents are held apart.
DOCUMENT_BITS, MARGIN = 24, 256
RESIDUALS = "attended"  # what splash keeps for its backward pass, by the name of `jax.checkpoint`


def chosen(config: AttentionConfig, dtype: str, isolated: bool, device: jax.Device) -> str:
    """The implementation that a model's attention has on a device.

    Args:
      config: its `implementation` is a name, or "auto": the first of `available` but "cudnn".
      dtype: of activations.
      isolated: whether documents are kept apart.
      device: any of those that the model runs on.

    Raises:
      UserError: the named one does not run there.
    """
    name = config.implementation
    if name == "auto":
        names = available(config, dtype, isolated, device)
        return next(name for name in names if name != "cudnn")
    obstacle = _obstacle(name, config, dtype, isolated, device)
    require(obstacle is None, "model.attention.implementation", name,
            f"{obstacle}; auto takes what there is")
    return name


def available(
    config: AttentionConfig, dtype: str, isolated: bool, device: jax.Device
) -> tuple[str, ...]:
    """The implementations that a device has for such a model."""
    return tuple(name for name in ("splash", "cudnn", "xla")
                 if _obstacle(name, config, dtype, isolated, device) is None)


def _obstacle(
    name: str, config: AttentionConfig, dtype: str, isolated: bool, device: jax.Device
) -> str | None:
    """Why an implementation cannot be had on a device; None if it can."""
    here = f"and the device is {device.device_kind}"
    if name == "splash" and device.platform != "tpu":
        return f"runs on TPUs, {here}"
    if name == "cudnn":
        if device.platform != "gpu" or "cuda" not in device.client.platform_version:
            return f"runs on NVIDIA's GPUs, {here}"
        if dtype != "bfloat16":
            return f"takes bfloat16, and model.compute_dtype is {dtype}"
        width = _cudnn_width(config.nope_dim + config.rope_dim, config.value_dim, isolated)
        most = CUDNN_WIDE if float(device.compute_capability) >= HOPPER else CUDNN_WIDTH
        if width > most:
            return f"takes heads up to {most} wide on {device.device_kind}, and these need {width}"
    return None


def causal_attention(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array,
    documents_BT: jax.Array | None, scale: float, implementation: str,
) -> jax.Array:
    """What each position takes of the values up to its own.

    Args:
      query_BTHX, key_BSHX, value_BSHV: of the same positions, in one dtype.
      documents_BT: int32 document numbers; attention then stays within a document.
      scale: what the products of queries and keys are multiplied by.
      implementation: as `chosen` gives it.

    Returns:
      [B, T, H, V] in the same dtype; scores and softmax are float32.
    """
    attend = {"xla": in_chunks, "splash": splash, "cudnn": cudnn}[implementation]
    return attend(query_BTHX, key_BSHX, value_BSHV, documents_BT, scale)


def in_chunks(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array,
    documents_BT: jax.Array | None, scale: float,
) -> jax.Array:
    """`causal_attention` in plain JAX.

    Long sequences are cut into chunks of queries, each against the keys up to its own end, whose
    scores are computed anew in the backward pass: no more than [B, H, QUERY_CHUNK, KEYS] of them
    are kept at a time, and those of keys that come after the chunk are never computed. Each chunk
    waits for the one before, or a compiler may run all of them at once.
    """
    time = query_BTHX.shape[1]
    if time <= QUERY_CHUNK:
        return _mix(query_BTHX, key_BSHX, value_BSHV, documents_BT, 0, scale)
    if time > KEYS:
        return _in_loops(query_BTHX, key_BSHX, value_BSHV, documents_BT, scale)
    mix = jax.checkpoint(_mix, static_argnums=(4, 5))
    chunks: list[jax.Array] = []
    for start in range(0, time, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, time)
        documents = None if documents_BT is None else documents_BT[:, :stop]
        query = query_BTHX[:, start:stop]
        if chunks:
            query, chunks[-1] = jax.lax.optimization_barrier((query, chunks[-1]))
        chunks.append(mix(query, key_BSHX[:, :stop], value_BSHV[:, :stop], documents, start, scale))
    return jnp.concatenate(chunks, axis=1)


def _in_loops(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array,
    documents_BT: jax.Array | None, scale: float,
) -> jax.Array:
    """`in_chunks` of very long sequences, in time that is filled up to whole chunks."""
    time = query_BTHX.shape[1]
    size = max(QUERY_CHUNK * KEYS // time, 1)
    query, key, value = (_lengthened(part, size) for part in (query_BTHX, key_BSHX, value_BSHV))
    documents = None if documents_BT is None else _lengthened(documents_BT, size, -1)
    count = query.shape[1] // size
    cuts = sorted({size * (count * part // PARTS) for part in range(PARTS + 1)})
    parts = [_loop(query[:, start:stop], key[:, :stop], value[:, :stop],
                   None if documents is None else documents[:, :stop], size, scale)
             for start, stop in itertools.pairwise(cuts)]
    return jnp.concatenate(parts, axis=1)[:, :time]


def _loop(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array,
    documents_BS: jax.Array | None, size: int, scale: float,
) -> jax.Array:
    """The last T positions of S, `size` of them at a time."""
    time, all_S = query_BTHX.shape[1], jnp.arange(key_BSHX.shape[1], dtype=jnp.int32)
    first = key_BSHX.shape[1] - time

    @jax.checkpoint
    def one(start: jax.Array) -> jax.Array:
        query = jax.lax.dynamic_slice_in_dim(query_BTHX, start - first, size, axis=1)
        mask_BTS = (all_S[None] <= start + jnp.arange(size, dtype=jnp.int32)[:, None])[None]
        if documents_BS is not None:
            own_BT = jax.lax.dynamic_slice_in_dim(documents_BS, start, size, axis=1)
            mask_BTS &= own_BT[:, :, None] == documents_BS[:, None]
        return _weighted(query, key_BSHX, value_BSHV, mask_BTS, scale)

    mixed = jax.lax.map(one, first + size * jnp.arange(time // size, dtype=jnp.int32))
    return jnp.moveaxis(mixed, 0, 1).reshape(mixed.shape[1], time, *mixed.shape[3:])


def _mix(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array,
    documents_BS: jax.Array | None, start: int, scale: float,
) -> jax.Array:
    """`in_chunks` for the queries at positions start..S-1."""
    mask_BTS = visible(key_BSHX.shape[1], documents_BS, start)
    return _weighted(query_BTHX, key_BSHX, value_BSHV, mask_BTS, scale)


def _weighted(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array, mask_BTS: jax.Array,
    scale: float,
) -> jax.Array:
    """The values, weighted by the softmax of the scores that the mask lets through."""
    scores_BHTS = jnp.einsum(
        "bthx,bshx->bhts", query_BTHX, key_BSHX, preferred_element_type=jnp.float32)
    scores_BHTS = scores_BHTS * scale
    weights_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, -1e30), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights_BHTS.astype(query_BTHX.dtype), value_BSHV)


def visible(time: int, documents_BS: jax.Array | None, start: int = 0) -> jax.Array:
    """bool [B or 1, T, S]: may position t of start..time-1 look at position s of 0..time-1?"""
    causal_1TS = jnp.tril(jnp.ones((1, time - start, time), bool), start)
    if documents_BS is None:
        return causal_1TS
    return causal_1TS & (documents_BS[:, start:, None] == documents_BS[:, None, :])


def splash(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array,
    documents_BT: jax.Array | None, scale: float, interpret: bool = False,
) -> jax.Array:
    """`causal_attention` by JAX's flash attention for TPUs.

    Keys and values may differ in width. Sequences are filled up to whole blocks with positions that
    come after all others, so nobody sees them. The kernel knows no scale: queries are multiplied by
    it in float32 and rounded to their dtype once more.

    Args:
      interpret: run the kernel's own arithmetic in plain JAX, on any device and slowly.
    """
    query, key, value = (
        jnp.swapaxes(part, 1, 2) for part in (query_BTHX, key_BSHX, value_BSHV))
    return jnp.swapaxes(
        splash_by_head(query, key, value, documents_BT, scale, interpret), 1, 2)


def splash_by_head(
    query_BHTX: jax.Array, key_BHSX: jax.Array, value_BHSV: jax.Array,
    documents_BT: jax.Array | None, scale: float, interpret: bool = False,
) -> jax.Array:
    """`splash` with the heads before the time, as the kernel has them: [B, H, T, V]."""
    heads, time = query_BHTX.shape[1:3]
    block = min(SPLASH_BLOCK, -(-time // LANES) * LANES)
    query_BHTX = (query_BHTX.astype(jnp.float32) * scale).astype(query_BHTX.dtype)
    query, key, value = (
        _lengthened(part, block, axis=2) for part in (query_BHTX, key_BHSX, value_BHSV))
    query = checkpoint_name(query, RESIDUALS)  # of the three what costs most to make anew
    segments = None
    if documents_BT is not None:
        own = _lengthened(documents_BT, block, -1)
        segments = splash_attention.SegmentIds(q=own, kv=own)
    kernel = _splash_kernel(query.shape[2], heads, block, interpret)
    mixed_BHTV: jax.Array = jax.vmap(kernel)(query, key, value, segments)
    return mixed_BHTV[:, :, :time]


def _splash_kernel(time: int, heads: int, block: int, interpret: bool) -> Any:
    """The kernel of a shape; it sees [H, T, X], blocks of the future are never computed."""
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((time, time))] * heads)
    return splash_attention.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret,
        residual_checkpoint_name=RESIDUALS)


def _lengthened(x: jax.Array, block: int, value: int = 0, axis: int = 1) -> jax.Array:
    """x with `value` at the end of the time, which is at `axis`, so that blocks divide it."""
    after = -x.shape[axis] % block
    return jnp.pad(x, [(0, after * (each == axis)) for each in range(x.ndim)],
                   constant_values=value)


def cudnn(
    query_BTHX: jax.Array, key_BSHX: jax.Array, value_BSHV: jax.Array,
    documents_BT: jax.Array | None, scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`causal_attention` by `jax.nn.dot_product_attention`.

    It wants keys and values of one width, so the narrower ones are filled up with zeros. It takes
    documents only as a mask of the size of all scores, so they are written into queries and keys
    instead: each bit of a document's number is a column of +a or -a. The products of a document
    with itself all grow by the same, which the softmax does not see; those of two documents stay
    behind by `MARGIN` nats at least, and the weights between them are 0.

    Args:
      implementation: "xla" is the same on any device, with all scores in memory.
    """
    width, wide = query_BTHX.shape[-1], value_BSHV.shape[-1]
    if documents_BT is not None:
        code_BT1X = _document_code(documents_BT, scale).astype(query_BTHX.dtype)[:, :, None]
        query_BTHX, key_BSHX = (
            jnp.concatenate([part, jnp.broadcast_to(code_BT1X, (*part.shape[:3], DOCUMENT_BITS))],
                            axis=-1) for part in (query_BTHX, key_BSHX))
    padded = _cudnn_width(width, wide, documents_BT is not None)
    query, key, value = (
        jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, padded - part.shape[-1])))
        for part in (query_BTHX, key_BSHX, value_BSHV))
    mixed = jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=True, implementation=implementation)
    return mixed[..., :wide]


def _cudnn_width(width: int, value_dim: int, isolated: bool) -> int:
    """The one width of queries, keys and values, a multiple of 8."""
    return -(-max(width + DOCUMENT_BITS * isolated, value_dim) // 8) * 8


def _document_code(documents_BT: jax.Array, scale: float) -> jax.Array:
    """Each document's number as +-a, [B, T, DOCUMENT_BITS]; a whole number, so bfloat16 has it."""
    size = math.ceil(math.sqrt(MARGIN / 2 / scale))
    bits = (documents_BT[..., None] >> jnp.arange(DOCUMENT_BITS)[None, None]) & 1
    return size * (2 * bits - 1)
