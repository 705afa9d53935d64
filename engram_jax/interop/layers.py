"""Flax layers of released memories, over tables in any home off the device.

Rows are fetched inside the program by a callback to the host: right for trying a released memory
out, and for networks that are not ours. It waits for the rows; our engine does not (`HostRows`).

Shapes: B batch, T time, M streams, D width, H rows of a token, C columns of a row, P positions that
the convolution looks back, N - 1 tokens of history.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.hashing.token_hash import BEFORE, TokenHash
from engram_jax.interop.released import Released
from engram_jax.model.engram import GATE_CLAMP, fuse, init_engram
from engram_jax.model.layers import Params, rms_norm
from engram_jax.offload.home import Home


def rows_from(home: Home, ids_BTH: jax.Array) -> jax.Array:
    """Rows of a home, float32 [B, T, H, C]; for use under jit."""
    width = home.format.row_bytes

    def fetched(ids: Any) -> np.ndarray:
        return home.lookup(np.asarray(ids).reshape(-1)).reshape(*np.shape(ids), width)

    shape = jax.ShapeDtypeStruct((*ids_BTH.shape, width), jnp.uint8)
    return home.format.unpack(jax.pure_callback(fetched, shape, ids_BTH, vmap_method="sequential"))


def fuse_v41(params: Params, hidden_BTMD: jax.Array, rows_BTHC: jax.Array, eps: float,
             dead_BT: jax.Array | None = None) -> jax.Array:
    """What V4.1's memory adds to each stream, float32 [B, T, M, D] (docs/spec.md section 5).

    Products are of the hidden state's dtype, in which fp8 rows and weights lose nothing, and sums
    are float32. The score's root keeps the sign of a score of zero, as `copysign` does; the demo's
    gives 0.

    Args:
      params: project [M + 1, E, D], the keys and then the value; query_gain, key_gain [M, D].
      hidden_BTMD: before the block's attention.
      rows_BTHC: of each token.
      eps: of the norms of queries and keys.
      dead_BT: tokens whose gates are 0.
    """
    memory_BTE = rows_BTHC.reshape(*rows_BTHC.shape[:2], -1).astype(hidden_BTMD.dtype)
    projected = jnp.einsum("bte,med->btmd", memory_BTE, params["project"].astype(memory_BTE.dtype),
                           preferred_element_type=jnp.float32)
    key_BTMD, value_BT1D = projected[:, :, :-1], projected[:, :, -1:]
    query = rms_norm(hidden_BTMD.astype(jnp.float32), params["query_gain"], eps)
    key = rms_norm(key_BTMD, params["key_gain"], eps)
    score_BTM = jnp.sum(query * key, axis=-1) * hidden_BTMD.shape[-1] ** -0.5
    root_BTM = jnp.sqrt(jnp.maximum(jnp.abs(score_BTM), GATE_CLAMP))
    gate_BTM = jax.nn.sigmoid(jnp.copysign(root_BTM, score_BTM))
    if dead_BT is not None:
        gate_BTM = jnp.where(dead_BT[:, :, None], 0, gate_BTM)
    return gate_BTM[..., None] * value_BT1D


class V41Engram(nn.Module):
    """The memory of a DeepSeek-V4.1 layer: hashes, looks up in a home and fuses.

    Attributes:
      config: settings of the module.
      memory: tokens to rows.
      layer: one of `config.layers`.
      home: of the layer's table.
    """

    config: EngramConfig
    memory: TokenHash
    layer: int
    home: Home

    @nn.compact
    def __call__(self, hidden: jax.Array, token_ids: jax.Array,
                 history: jax.Array | None = None) -> jax.Array:
        """The hidden state with what the memory gave added.

        Args:
          hidden: [B, T, M, D].
          token_ids: raw ids, int32 [B, T].
          history: int32 [B, N - 1], the raw ids before these, oldest first, `BEFORE` before the
            start; None is the start.

        Returns:
          The shape and dtype of `hidden`.

        Raises:
          UserError: shapes that do not go together.
        """
        _check(hidden, token_ids)
        params = self.param("fusion", init_engram, hidden.shape[-1], hidden.shape[2], self.config)
        rows_BTHC = rows_from(self.home, self.memory.table_ids(token_ids, self.layer, history))
        delta_BTMD = fuse_v41(params, hidden, rows_BTHC, self.config.norm_eps,
                              self.memory.dead(token_ids) if self.memory.dead_ids else None)
        return (hidden + delta_BTMD).astype(hidden.dtype)


class QwenState(NamedTuple):
    """What a sequence leaves for its next token: raw ids int32 [B, N - 1], `BEFORE` before the
    start, and what the convolution read [B, P, M, D]."""

    history: jax.Array
    before_BPMD: jax.Array


class QwenEngram(nn.Module):
    """The memory of a Qwen3.8 layer, with its convolution; attributes as of `V41Engram`."""

    config: EngramConfig
    memory: TokenHash
    layer: int
    home: Home

    @nn.compact
    def __call__(self, hidden: jax.Array, token_ids: jax.Array,
                 state: QwenState | None = None) -> tuple[jax.Array, QwenState]:
        """The hidden state with what the memory gave added, and the state after these tokens.

        Args:
          hidden: [B, T, M, D].
          token_ids: raw ids, int32 [B, T].
          state: after the tokens before these; None is the start.

        Raises:
          UserError: shapes that do not go together.
        """
        _check(hidden, token_ids)
        config, (batch, _, streams, width) = self.config, hidden.shape
        if state is None:
            state = QwenState(
                jnp.full((batch, config.max_order - 1), BEFORE, jnp.int32),
                jnp.zeros((batch, config.conv_reach, streams, width), hidden.dtype))
        params = self.param("fusion", init_engram, width, streams, config)
        rows_BTHC = rows_from(
            self.home, self.memory.table_ids(token_ids, self.layer, state.history))
        fused = fuse(params, hidden, rows_BTHC, config, before_BPMD=state.before_BPMD)
        assert fused.taps_BTMD is not None, "the module has a convolution"
        after = QwenState(
            jnp.concatenate([state.history, token_ids], axis=1)[:, token_ids.shape[1]:],
            jnp.concatenate([state.before_BPMD, fused.taps_BTMD], axis=1)[:, token_ids.shape[1]:])
        return hidden + fused.delta_BTMD, after


LAYERS = {"deepseek-v4.1": V41Engram, "qwen3.8": QwenEngram}


def layer_of(released: Released, layer: int) -> tuple[nn.Module, dict[str, Any]]:
    """The Flax layer of a released memory, and its variables.

    Raises:
      UserError: a layer that has no memory.
    """
    require(layer in released.layers, "layer", layer, f"must be one of {released.layers}")
    module = LAYERS[released.source](config=released.config, memory=released.memory, layer=layer,
                                     home=released.tables[layer])
    fusion = {name: jnp.asarray(value) for name, value in released.params[layer].items()}
    return module, {"params": {"fusion": fusion}}


def _check(hidden: jax.Array, token_ids: jax.Array) -> None:
    require(hidden.ndim == 4, "hidden.shape", hidden.shape, "must be [B, T, M, D]")
    require(token_ids.shape == hidden.shape[:2], "token_ids.shape", token_ids.shape,
            f"must be {hidden.shape[:2]}, the first two of hidden's")
