"""The Engram module: what the n-grams retrieved, gated by the hidden state.

It is docs/spec.md section 1. `fuse` is the module as a pure function with rows as an input;
`Engram` is the drop-in Linen module that hashes, looks up in a table of its own and fuses.

Shapes: B batch, T time, M streams, D width, H = (N - 1) * K rows of a token, C columns of a row,
E = H * C, L taps of the convolution.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from engram_jax.config import EngramConfig, require
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.model.layers import Params, matrix, rms_norm
from engram_jax.tables.layout import TableLayout

GATE_CLAMP = 1e-6


def init_engram(key: jax.Array, width: int, branches: int, config: EngramConfig) -> Params:
    """Parameters beside the table, all float32, for M = `config.branches(streams)`.

    project [M + 1, E, D]: the branches' W_K, then the one W_V; bias [M + 1, D] if set;
    query_gain, key_gain [M, D]; with a convolution, conv_gain [M, D] and conv [L, M, D], zeros.
    Without a gate there are neither W_K nor gains of queries and keys.
    """
    keys = branches if config.gated else 0
    params = {"project": matrix(key, keys + 1, config.memory_dim, width)}
    if config.gated:
        params["query_gain"] = jnp.ones((branches, width), jnp.float32)
        params["key_gain"] = jnp.ones((branches, width), jnp.float32)
    if config.bias:
        params["bias"] = jnp.zeros((keys + 1, width), jnp.float32)
    if config.kernel:
        params["conv_gain"] = jnp.ones((branches, width), jnp.float32)
        params["conv"] = jnp.zeros((config.kernel, branches, width), jnp.float32)
    return params


class Fused(NamedTuple):
    """delta_BTMD, to be added to the streams; the gates, float32 [B, T, M]; what the convolution
    read, [B, T, M, D], None without one. M is 1 where one gate serves all streams."""

    delta_BTMD: jax.Array
    gate_BTM: jax.Array
    taps_BTMD: jax.Array | None


def fuse(
    params: Params,
    hidden_BTMD: jax.Array,
    rows_BTHC: jax.Array,
    config: EngramConfig,
    position_BT: jax.Array | None = None,
    before_BPMD: jax.Array | None = None,
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
    """
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
    mixed_BTMD = causal_conv(
        normed_BTMD, params["conv"], config.conv_dilation, position_BT, before_BPMD)
    return Fused(jax.nn.silu(mixed_BTMD) + gated_BTMD, gate_BTM, normed_BTMD)


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


class Engram(nn.Module):
    """Engram for somebody else's Flax block: hashes, looks up and fuses.

    The table is a parameter of the module, so its gradient is dense: right for small tables and
    for trying things out. Large tables want the training loop of this library, where rows are an
    input and only the touched rows are updated.

    Attributes:
      config: settings; the table's rows per head included.
      vocabulary: canonical ids of the tokenizer; None hashes raw ids below `config.vocab_size`.
      layer: which of `config.layers` this module stands for (it seeds the hash); None is the first.
    """

    config: EngramConfig
    vocabulary: CompressedVocabulary | None = None
    layer: int | None = None

    @nn.compact
    def __call__(self, hidden: jax.Array, token_ids: jax.Array) -> jax.Array:
        """The hidden state with what the memory gave added.

        Args:
          hidden: [B, T, D], or [B, T, M, D] for M residual streams.
          token_ids: raw ids, int32 [B, T].

        Returns:
          The shape and dtype of `hidden`.

        Raises:
          UserError: a layer or pad id that there is not, or shapes that do not go together.
        """
        config = self.config
        layer = config.layers[0] if self.layer is None else self.layer
        vocabulary = self.vocabulary or CompressedVocabulary.identity(config.vocab_size)
        raw_ids = vocabulary.lookup.size
        require(config.keys == "ngrams", "EngramConfig.keys", config.keys,
                "is a control of the training loop; a module of its own has ngrams")
        require(not config.one_table, "EngramConfig.one_table", config.one_table,
                "is of the training loop; a module of its own has a table of its own")
        require(layer in config.layers, "Engram.layer", layer, f"must be one of {config.layers}")
        require(0 <= config.pad_id < raw_ids, "EngramConfig.pad_id", config.pad_id,
                f"must be a raw token id, in 0..{raw_ids - 1}")
        require(hidden.ndim in (3, 4), "hidden.shape", hidden.shape,
                "must be [B, T, D] or [B, T, M, D]")
        require(token_ids.shape == hidden.shape[:2], "token_ids.shape", token_ids.shape,
                f"must be {hidden.shape[:2]}, the first two of hidden's")
        ngrams = NgramHash(
            rows_per_head=config.rows_per_head, heads=config.heads, layers=config.layers,
            vocab_size=vocabulary.size, pad_id=int(vocabulary.lookup[config.pad_id]),
            seed=config.hash_seed)
        layout = TableLayout(
            rows=ngrams.table_rows[layer], dim=config.head_dim, shards=config.shards)
        table = self.param("table", layout.init, config.table_std)
        streams_BTMD = hidden if hidden.ndim == 4 else hidden[:, :, None]
        params = self.param("fusion", init_engram, hidden.shape[-1],
                            config.branches(streams_BTMD.shape[2]), config)
        rows_BTHC = layout.gather(
            table, ngrams.table_ids(vocabulary.canonical(token_ids), layer))
        fused = fuse(params, streams_BTMD, rows_BTHC, config)
        self.sow("intermediates", "gate", fused.gate_BTM)
        return (streams_BTMD + fused.delta_BTMD).reshape(hidden.shape)
