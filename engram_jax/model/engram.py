"""The Engram module as a pure function: what the n-grams retrieved, gated by the hidden state.

`fuse` takes rows as an input (docs/spec.md section 1). As a module it stands in `linen` and `nnx`.

Shapes: B batch, T time, M streams, D width, H = (N - 1) * K rows of a token, C columns of a row,
E = H * C, L taps of the convolution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.model.layers import Params, rms_norm
from engram_jax.model.parameters import Declared, counted_as, matrix, taps, values, vector
from engram_jax.model.sequence import Stretch, alone

GATE_CLAMP = 1e-6


def init_engram(key: jax.Array, width: int, branches: int, config: EngramConfig) -> Params:
    """Parameters of the fusion, beside the table, as `engram_parameters` declares them."""
    return values(engram_parameters(key, width, branches, config))


def engram_parameters(
    key: jax.Array, width: int, branches: int, config: EngramConfig
) -> Declared:
    """Parameters beside the table, all float32, for M = `config.branches(streams)`.

    project [M + 1, E, D]: the branches' W_K, then the one W_V; bias [M + 1, D] if set;
    query_gain, key_gain [M, D]; with a convolution, conv_gain [M, D] and conv [L, M, D], zeros.
    Without a gate there are neither W_K nor gains of queries and keys.
    """
    keys = branches if config.gated else 0
    declared: Declared = {"project": matrix(key, keys + 1, config.memory_dim, width)}
    if config.gated:
        declared["query_gain"] = vector(jnp.ones((branches, width)))
        declared["key_gain"] = vector(jnp.ones((branches, width)))
    if config.bias:
        declared["bias"] = vector(jnp.zeros((keys + 1, width)))
    if config.kernel:
        declared["conv_gain"] = vector(jnp.ones((branches, width)))
        declared["conv"] = taps((config.kernel, branches, width))
    return counted_as("engram fusion", declared)


def as_streams(hidden: jax.Array) -> jax.Array:
    """A guest's hidden state, [B, T, D] or [B, T, M, D], as residual streams [B, T, M, D]."""
    check_array("hidden", hidden, "[B, T, D] or [B, T, M, D]")
    require(hidden.ndim in (3, 4), "hidden.shape", hidden.shape,
            "must be [B, T, D] or [B, T, M, D]")
    return hidden if hidden.ndim == 4 else hidden[:, :, None]


def check_array(name: str, value: object, right: str) -> None:
    """Refuse (UserError) lists, dicts and the like for an argument that is an array."""
    require(isinstance(value, jax.Array | np.ndarray), name, type(value).__name__,
            f"must be an array, {right}")


class Fused(NamedTuple):
    """delta_BTMD, to be added to the streams; the gates, float32 [B, T, M]; what the convolution
    read, [B, T, M, D], None without one. M is 1 where one gate serves all streams."""

    delta_BTMD: jax.Array
    gate_BTM: jax.Array
    taps_BTMD: jax.Array | None

    def last_taps(self, before_BPMD: jax.Array) -> jax.Array:
        """`before_BPMD` of the tokens that come next, from that of these."""
        assert self.taps_BTMD is not None, "there is no convolution"
        joined_BSMD = jnp.concatenate([before_BPMD, self.taps_BTMD], axis=1)
        return joined_BSMD[:, joined_BSMD.shape[1] - before_BPMD.shape[1]:]


@jax.named_scope("fusion")
def fuse(
    params: Params,
    hidden_BTMD: jax.Array,
    rows_BTHC: jax.Array,
    config: EngramConfig,
    position_BT: jax.Array | None = None,
    before_BPMD: jax.Array | None = None,
    stretch: Stretch = alone,
) -> Fused:
    """Y of H <- H + Y (paper eq. 4 to 6).

    Args:
      params: as `init_engram` makes them, for as many branches as the module has gates.
      hidden_BTMD: residual streams before the block's attention.
      rows_BTHC: the rows of each token, any float dtype.
      config: settings of the module.
      position_BT: position of each token in its document; the convolution then stops at the
        document's start.
      before_BPMD: what the convolution read at the P = `config.conv_reach` positions before these,
        oldest first; None where there were none.
      stretch: of the sequence that these tokens are; what the convolution reads before them is then
        the stretch before's.

    Raises:
      UserError: what is no array, shapes or dtypes that do not go together, rows that are bits and
        not numbers, or parameters that are missing.
    """
    _check(params, hidden_BTMD, rows_BTHC, config, position_BT, before_BPMD)
    if not config.per_branch:
        hidden_BTMD = jnp.mean(hidden_BTMD, axis=2, keepdims=True)
    memory_BTE = rows_BTHC.reshape(*rows_BTHC.shape[:2], -1).astype(hidden_BTMD.dtype)
    projected = jnp.einsum("bte,med->btmd", memory_BTE, params["project"].astype(memory_BTE.dtype))
    if config.bias:
        projected = projected + params["bias"][None, None].astype(projected.dtype)
    key_BTMD, value_BT1D = projected[:, :, :-1], projected[:, :, -1:]
    gate_BTM = gate(params, hidden_BTMD, key_BTMD, config)
    gated_BTMD = gate_BTM[..., None].astype(value_BT1D.dtype) * value_BT1D
    if not config.kernel:
        return Fused(gated_BTMD, gate_BTM, None)
    normed_BTMD = rms_norm(gated_BTMD, params["conv_gain"], config.conv_norm_eps)
    if before_BPMD is None:
        before_BPMD = stretch.before(normed_BTMD, config.conv_reach)
    mixed_BTMD = causal_conv(
        normed_BTMD, params["conv"], config.conv_dilation, position_BT, before_BPMD)
    return Fused(jax.nn.silu(mixed_BTMD) + gated_BTMD, gate_BTM, normed_BTMD)


def _check(
    params: Params, hidden: jax.Array, rows: jax.Array, config: EngramConfig,
    position: jax.Array | None, before: jax.Array | None,
) -> None:
    """Refuse (UserError) what would broadcast, or be read as other numbers."""
    check_array("hidden", hidden, "[B, T, M, D]")
    check_array("rows", rows, "[B, T, H, C]; of a look-up's rows, those of one layer, rows[layer]")
    require(hidden.ndim == 4, "hidden.shape", hidden.shape,
            "must be [B, T, M, D]; one residual stream is hidden[:, :, None]")
    require(bool(jnp.issubdtype(hidden.dtype, jnp.floating)), "hidden.dtype", str(hidden.dtype),
            "must be a float type")
    missing = [name for name in _names(config) if name not in params]
    require(not missing, "params", sorted(params), f"must have {', '.join(missing)}, too, as "
            "init_engram makes them")
    batch_time, branches = hidden.shape[:2], config.branches(hidden.shape[2])
    project = params["project"].shape
    made_for = project[0] - 1 if config.gated else branches, project[2]
    require(made_for == (branches, hidden.shape[3]), "hidden.shape", hidden.shape,
            f"has {branches} gates and width {hidden.shape[3]}, and the parameters are of "
            f"{made_for[0]} and {made_for[1]}")
    right = *batch_time, config.total_heads, config.head_dim
    require(rows.shape == right, "rows.shape", rows.shape,
            f"must be {right}: B, T, (max_order - 1) * heads, head_dim")
    require(bool(jnp.issubdtype(rows.dtype, jnp.floating)), "rows.dtype", str(rows.dtype),
            "must be a float type; the bits of a bfloat16 table are decoded by "
            "engram_jax.tables.rounding.decode")
    require(position is None or position.shape == batch_time, "position.shape",
            getattr(position, "shape", None), f"must be {batch_time}, B and T")
    require(position is None or bool(jnp.issubdtype(position.dtype, jnp.integer)),
            "position.dtype", str(getattr(position, "dtype", None)), "must be a whole-number type")
    right = batch_time[0], config.conv_reach, branches, hidden.shape[3]
    require(before is None or before.shape == right, "before.shape",
            getattr(before, "shape", None), f"must be {right}: B, conv_reach, gates, D")


def _names(config: EngramConfig) -> tuple[str, ...]:
    """The parameters that a module of these settings reads."""
    return ("project", *("query_gain", "key_gain") * config.gated, *("bias",) * config.bias,
            *("conv_gain", "conv") * bool(config.kernel))


@jax.named_scope("gate")
def gate(
    params: Params, hidden_BTMD: jax.Array, key_BTMD: jax.Array, config: EngramConfig
) -> jax.Array:
    """sigmoid of the scaled product of the normalised hidden state and key, float32 [B, T, M];
    ones without a gate."""
    if not config.gated:
        return jnp.ones(hidden_BTMD.shape[:-1], jnp.float32)
    query = rms_norm(hidden_BTMD.astype(jnp.float32), params["query_gain"], config.norm_eps)
    key = rms_norm(key_BTMD.astype(jnp.float32), params["key_gain"], config.norm_eps)
    score_BTM = jnp.sum(query * key, axis=-1) * hidden_BTMD.shape[-1] ** -0.5
    if config.signed_root:
        score_BTM = jnp.sign(score_BTM) * jnp.sqrt(jnp.maximum(jnp.abs(score_BTM), GATE_CLAMP))
    return jax.nn.sigmoid(score_BTM)


@jax.named_scope("convolution")
def causal_conv(
    x_BTMD: jax.Array,
    taps_LMD: jax.Array,
    dilation: int,
    position_BT: jax.Array | None,
    before_BPMD: jax.Array | None = None,
) -> jax.Array:
    """Depthwise convolution: out[t] = sum_l taps[l] x[t - (L - 1 - l) dilation].

    `before_BPMD` is what came before x, P = (L - 1) dilation positions; None is zeros.
    """
    taps, time = taps_LMD.shape[0], x_BTMD.shape[1]
    reach = (taps - 1) * dilation
    total = jnp.zeros_like(x_BTMD)
    for tap in range(taps):
        back = (taps - 1 - tap) * dilation
        if before_BPMD is not None:
            joined_BSMD = jnp.concatenate([before_BPMD, x_BTMD], axis=1)
            shifted = joined_BSMD[:, reach - back : reach - back + time]
        elif back >= time:
            continue
        else:
            shifted = jnp.pad(x_BTMD[:, : time - back], ((0, 0), (back, 0), (0, 0), (0, 0)))
        if position_BT is not None:
            shifted = jnp.where((position_BT >= back)[:, :, None, None], shifted, 0)
        total = total + shifted * taps_LMD[tap][None, None].astype(x_BTMD.dtype)
    return total
