"""Multi-head latent attention without query compression (DeepSeek-V2, arXiv 2405.04434).

What is kept of a position is its latent [C] and one rotated key [R] that all heads share. Training
expands the latents to keys and values; decoding (`cached_attention`) attends to the latents
themselves, with the expansion moved over to the query and to the result.

Shapes: B batch, T time (S the attended time), D width, H heads, C latent rank, N and R the parts of
a head without and with rotary positions, V value dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import AttentionConfig, YarnConfig
from engram_jax.model import attention_kernels
from engram_jax.model.layers import Params, linear, rms_norm
from engram_jax.model.parameters import Declared, matrix, vector
from engram_jax.model.sequence import Stretch, alone


def attention_parameters(key: jax.Array, width: int, config: AttentionConfig) -> Declared:
    """query [D, H(N+R)], latent [D, C+R], latent_gain [C], expand [C, H(N+V)], output [HV, D]."""
    keys = jax.random.split(key, 4)
    head = config.nope_dim + config.rope_dim
    return {
        "query": matrix(keys[0], width, config.heads * head),
        "latent": matrix(keys[1], width, config.kv_rank + config.rope_dim),
        "latent_gain": vector(jnp.ones(config.kv_rank)),
        "expand": matrix(keys[2], config.kv_rank,
                         config.heads * (config.nope_dim + config.value_dim)),
        "output": matrix(keys[3], config.heads * config.value_dim, width),
    }


@jax.named_scope("attention")
def attention(
    params: Params,
    x_BTD: jax.Array,
    config: AttentionConfig,
    eps: float,
    documents_BS: jax.Array | None = None,
    stretch: Stretch = alone,
) -> jax.Array:
    """Causal attention of every position to itself and what came before.

    Args:
      params: the values of `attention_parameters`.
      x_BTD: normalised input.
      config: sizes and implementation; "auto" is that of this process's first device.
      eps: epsilon of the latent's norm.
      documents_BS: document numbers of the whole sequence; attention then stays within a document.
      stretch: of the sequence that x is; S is T where it is all of it.

    Returns:
      [B, T, D] in x's dtype; scores and softmax are float32.
    """
    batch, time, _ = x_BTD.shape
    n, v, heads = config.nope_dim, config.value_dim, config.heads // stretch.count
    positions_1T = stretch.positions(time)
    implementation = config.implementation
    if implementation == "auto":
        implementation = attention_kernels.chosen(
            config, str(x_BTD.dtype), documents_BS is not None, jax.local_devices()[0])
    if implementation == "splash" and stretch.count == 1:
        return _heads_first(params, x_BTD, positions_1T, config, eps, documents_BS)
    query = stretch.by_heads(
        jnp.concatenate(_queries(params, x_BTD, positions_1T, config), axis=-1))
    latent_BSC, shared_BSR = map(
        stretch.everywhere, latents(params, x_BTD, positions_1T, config, eps))
    expand = _expansion(params["expand"], config, stretch)
    expanded = linear(latent_BSC, expand).reshape(batch, -1, heads, n + v)
    key_BSHN, value_BSHV = jnp.split(expanded, [n], axis=-1)
    shared = jnp.broadcast_to(
        shared_BSR[:, :, None], (*key_BSHN.shape[:3], config.rope_dim))
    key = jnp.concatenate([key_BSHN, shared], axis=-1)
    mixed = attention_kernels.causal_attention(
        query, key, value_BSHV, documents_BS, config.score_scale, implementation)
    return linear(stretch.by_time(mixed).reshape(batch, time, -1), params["output"])


def _heads_first(
    params: Params, x_BTD: jax.Array, positions_1T: jax.Array, config: AttentionConfig, eps: float,
    documents_BT: jax.Array | None,
) -> jax.Array:
    """`attention` by splash of whole sequences, with heads before time from the products on.

    Splash wants [B, H, T, X]. Of [B, T, H, X] that is cut and joined along X, libtpu makes copies
    on the way there and, of gradients, on the way back: by its estimate a quarter of attention's
    time on v5p. So each part of a head has a product of its own, and joining is a sum, which fuses.
    """
    n, r, v = config.nope_dim, config.rope_dim, config.value_dim

    def parts(name: str, widths: list[int]) -> list[jax.Array]:
        """The columns of a weight [in, H X], by the parts of a head: [in, H, widths]."""
        weight = params[name].astype(x_BTD.dtype)
        by_head = weight.reshape(weight.shape[0], config.heads, sum(widths))
        return jnp.split(by_head, [widths[0]], axis=-1)

    def times(x_BTI: jax.Array, weight_IHX: jax.Array) -> jax.Array:
        return jnp.einsum("bti,ihx->bhtx", x_BTI, weight_IHX)

    plain, turned = (times(x_BTD, part) for part in parts("query", [n, r]))
    query_BHTX = _beside(plain, _rope_by_head(turned, positions_1T, config))
    latent_BTC, shared_BTR = latents(params, x_BTD, positions_1T, config, eps)
    plain, value_BHTV = (times(latent_BTC, part) for part in parts("expand", [n, v]))
    key_BHTX = _beside(plain, shared_BTR[:, None])
    mixed_BHTV = attention_kernels.splash_by_head(
        query_BHTX, key_BHTX, value_BHTV, documents_BT, config.score_scale)
    output_HVD = params["output"].astype(x_BTD.dtype).reshape(config.heads, v, -1)
    return jnp.einsum("bhtv,hvd->btd", mixed_BHTV, output_HVD)


@jax.custom_vjp
def _beside(first_BHTN: jax.Array, second: jax.Array) -> jax.Array:
    """The two along the last axis, as a sum of what is filled up with zeros; `second` is
    [B, H, T, R], or the same for all heads, [B, 1, T, R]."""
    lead = ((0, 0),) * (first_BHTN.ndim - 1)
    return (jnp.pad(first_BHTN, (*lead, (0, second.shape[-1])))
            + jnp.pad(second, (*lead, (first_BHTN.shape[-1], 0))))


def _beside_backward(
    shape: tuple[int, ...], grad_BHTX: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cut before heads are added up, which is in float32."""
    first, second = jnp.split(grad_BHTX, [grad_BHTX.shape[-1] - shape[-1]], axis=-1)
    if shape[1] != second.shape[1]:
        second = jnp.sum(second, axis=1, keepdims=True, dtype=jnp.float32).astype(grad_BHTX.dtype)
    return first, second


_beside.defvjp(lambda first, second: (_beside(first, second), second.shape), _beside_backward)


def _expansion(expand: jax.Array, config: AttentionConfig, stretch: Stretch) -> jax.Array:
    """The columns of the weight [C, H(N+V)] that make the own heads' keys and values."""
    if stretch.count == 1:
        return expand
    by_head = expand.reshape(config.kv_rank, config.heads, -1)
    return stretch.own_heads(by_head).reshape(config.kv_rank, -1)


def _queries(
    params: Params, x_BTD: jax.Array, positions_BT: jax.Array, config: AttentionConfig
) -> tuple[jax.Array, jax.Array]:
    """Each head's query: [B, T, H, N], and its rotated part [B, T, H, R]."""
    n, r = config.nope_dim, config.rope_dim
    query = linear(x_BTD, params["query"]).reshape(*x_BTD.shape[:2], config.heads, n + r)
    return query[..., :n], rope(query[..., n:], positions_BT, config)


def latents(
    params: Params, x_BTD: jax.Array, positions_BT: jax.Array, config: AttentionConfig, eps: float
) -> tuple[jax.Array, jax.Array]:
    """What a cache keeps of each position: latent [B, T, C] and rotated key [B, T, R]."""
    latent_BTC, shared_BTR = jnp.split(linear(x_BTD, params["latent"]), [config.kv_rank], axis=-1)
    latent_BTC = rms_norm(latent_BTC, params["latent_gain"], eps)
    shared_BT1R = rope(shared_BTR[:, :, None], positions_BT, config)
    return latent_BTC, shared_BT1R[:, :, 0]


@jax.named_scope("attention")
def cached_attention(
    params: Params,
    x_BTD: jax.Array,
    latent_BSC: jax.Array,
    shared_BSR: jax.Array,
    positions_BT: jax.Array,
    first_BT: jax.Array,
    config: AttentionConfig,
) -> jax.Array:
    """Attention of new positions to cached ones, their own included.

    Args:
      params: the values of `attention_parameters`.
      x_BTD: normalised input of the new positions.
      latent_BSC, shared_BSR: the cache, as `latents` gives it, position s at place s.
      positions_BT: int32, the new positions.
      first_BT: int32, the first position that each may look at; the last is itself.
      config: sizes.

    Returns:
      [B, T, D], what `attention` gives, to rounding.
    """
    expand_CHX = params["expand"].astype(x_BTD.dtype).reshape(
        config.kv_rank, config.heads, config.nope_dim + config.value_dim)
    key_CHN, value_CHV = jnp.split(expand_CHX, [config.nope_dim], axis=-1)
    query_BTHN, rotated_BTHR = _queries(params, x_BTD, positions_BT, config)
    query_BTHC = jnp.einsum("bthn,chn->bthc", query_BTHN, key_CHN)
    wide = {"preferred_element_type": jnp.float32}
    scores_BHTS = (jnp.einsum("bthc,bsc->bhts", query_BTHC, latent_BSC, **wide)
                   + jnp.einsum("bthr,bsr->bhts", rotated_BTHR, shared_BSR, **wide))
    scores_BHTS = scores_BHTS * config.score_scale
    place_11S = jnp.arange(latent_BSC.shape[1], dtype=jnp.int32)[None, None]
    mask_BTS = (place_11S >= first_BT[..., None]) & (place_11S <= positions_BT[..., None])
    weights_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, -1e30), axis=-1)
    mixed_BTHC = jnp.einsum("bhts,bsc->bthc", weights_BHTS.astype(x_BTD.dtype), latent_BSC)
    mixed_BTHV = jnp.einsum("bthc,chv->bthv", mixed_BTHC, value_CHV)
    return linear(mixed_BTHV.reshape(*x_BTD.shape[:2], -1), params["output"])


def frequencies(config: AttentionConfig) -> jax.Array:
    """The rotary frequencies of the pairs, float32 [R / 2]."""
    half = config.rope_dim // 2
    if config.yarn is not None:
        return jnp.asarray(_extended(config, config.yarn), jnp.float32)
    return config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def _extended(config: AttentionConfig, yarn: YarnConfig) -> np.ndarray:
    """YaRN's blend of the frequencies with those over the factor (arXiv 2309.00071 section 3.2).

    The ramp begins and ends at whole numbers of pairs, as in DeepSeek-V2's and V3's code.
    """

    def pair(turns: float) -> float:
        """The pair that turns so often within the original length."""
        wavelength = yarn.original_length / (2 * math.pi * turns)
        return config.rope_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair(yarn.beta_fast)), 0)
    last = min(math.ceil(pair(yarn.beta_slow)), config.rope_dim - 1)
    pairs = np.arange(config.rope_dim // 2)
    plain = config.rope_theta ** (-2 * pairs / config.rope_dim)
    divided = np.clip((pairs - first) / max(last - first, 1e-3), 0, 1)
    blended: np.ndarray = plain * (1 - divided) + plain / yarn.factor * divided
    return blended


def rope(x_BTHR: jax.Array, positions_BT: jax.Array, config: AttentionConfig) -> jax.Array:
    """Rotary positions, the two halves of the last axis as the pairs (not interleaved)."""
    angle_BT1R = _angles(positions_BT, config)[:, :, None]
    cos, sin = jnp.cos(angle_BT1R), jnp.sin(angle_BT1R)
    first, second = jnp.split(x_BTHR.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHR.dtype)


def _angles(positions_BT: jax.Array, config: AttentionConfig) -> jax.Array:
    """By how much each pair is turned, float32 [B, T, R / 2]."""
    return positions_BT.astype(jnp.float32)[..., None] * frequencies(config)[None, None]


def _rope_by_head(
    x_BHTR: jax.Array, positions_BT: jax.Array, config: AttentionConfig
) -> jax.Array:
    """`rope` with heads before time, in which the other one of each pair comes from a product.

    Halves of R are parts of a TPU's rows of 128, and to cut and join them takes memory several
    times. The product is with 1, -1 and 0, so of finite numbers it is exact; its gradient is turned
    back likewise.
    """
    angle_B1TR = _angles(positions_BT, config)[:, None]
    turn_B1TR = jnp.concatenate([angle_B1TR, angle_B1TR], axis=-1)
    return _turned(x_BHTR, jnp.cos(turn_B1TR), jnp.sin(turn_B1TR))


@jax.custom_vjp
def _turned(x_BHTR: jax.Array, cos_B1TR: jax.Array, sin_B1TR: jax.Array) -> jax.Array:
    half = np.eye(x_BHTR.shape[-1] // 2, dtype=np.float32)
    none = np.zeros_like(half)
    other_RR = jnp.asarray(np.block([[none, half], [-half, none]]), x_BHTR.dtype)
    other_BHTR = jnp.einsum(
        "bhtr,rs->bhts", x_BHTR, other_RR, precision="highest",
        preferred_element_type=jnp.float32)
    return (x_BHTR.astype(jnp.float32) * cos_B1TR + other_BHTR * sin_B1TR).astype(x_BHTR.dtype)


def _turned_forward(
    x_BHTR: jax.Array, cos_B1TR: jax.Array, sin_B1TR: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _turned(x_BHTR, cos_B1TR, sin_B1TR), (cos_B1TR, sin_B1TR)


def _turned_backward(
    saved: tuple[jax.Array, jax.Array], grad_BHTR: jax.Array
) -> tuple[jax.Array, None, None]:
    cos_B1TR, sin_B1TR = saved
    return _turned(grad_BHTR, cos_B1TR, -sin_B1TR), None, None


_turned.defvjp(_turned_forward, _turned_backward)
