"""Engram as Flax Linen modules, for somebody else's network.

`EngramFusion` is given rows, from wherever the table lies; `Engram` hashes, and looks up in a table
of its own. With `decode=True` both keep, in the collection `cache`, what the next call must know of
the tokens before it, as Flax's own attention does.

Shapes: B batch, T time, M streams, D width, N longest n-gram, S = N - 1 + T, H rows of a
token, C columns of a row.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from engram_jax.config import EngramConfig, require
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import BEFORE
from engram_jax.model.engram import as_streams, check_array, fuse, init_engram
from engram_jax.tables.layout import TableLayout


class EngramFusion(nn.Module):
    """Adds to the hidden state what the rows of its n-grams say.

    The rows are an input, so the module has no table: `engram_jax.tables` keeps one on a mesh,
    `engram_jax.offload` in host memory or on a disk. The gates are sown as `intermediates/gate`.

    Attributes:
      config: settings.
      decode: each call goes on where the last one ended: apply it with `mutable=["cache"]`.
    """

    config: EngramConfig
    decode: bool = False

    @nn.compact
    def __call__(
        self, hidden: jax.Array, rows: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """The hidden state with what the memory gave added.

        Args:
          hidden: [B, T, D], or [B, T, M, D] for M residual streams.
          rows: the rows of each token, [B, T, H, C], any float dtype.
          position: int32 [B, T], each token's position in its document, at whose start the
            convolution stops; None lets it cross.

        Returns:
          The shape and dtype of `hidden`.

        Raises:
          UserError: shapes that do not go together, or rows that are bits and not numbers.
        """
        return _fused(self, hidden, rows, position)


class Engram(nn.Module):
    """Engram for somebody else's Flax block: hashes, looks up and fuses.

    The table is a parameter of the module, so its gradient is dense: right for small tables and
    for trying things out. Large tables want `EngramFusion` beside a table of `engram_jax.tables`,
    of which only the touched rows are updated.

    Attributes:
      config: settings; the table's rows per head included.
      vocabulary: canonical ids of the tokenizer; None hashes raw ids below `config.vocab_size`.
      layer: which of `config.layers` this module stands for (it seeds the hash); None is the first.
      decode: each call goes on where the last one ended: apply it with `mutable=["cache"]`.
    """

    config: EngramConfig
    vocabulary: CompressedVocabulary | None = None
    layer: int | None = None
    decode: bool = False

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        token_ids: jax.Array,
        position: jax.Array | None = None,
        history: jax.Array | None = None,
    ) -> jax.Array:
        """The hidden state with what the memory gave added.

        Args:
          hidden: [B, T, D], or [B, T, M, D] for M residual streams.
          token_ids: raw ids, whole numbers [B, T]. Under jit an id that the vocabulary does not
            have makes its n-grams' output NaN; in NumPy it is refused.
          position: int32 [B, T], each token's position in its document, at whose start n-grams and
            convolution stop; None lets them cross.
          history: the raw ids before these, [B, at least N - 1], oldest first, -1 before the start
            of the text; None is the start of a text, or with `decode` what the cache has.

        Returns:
          The shape and dtype of `hidden`.

        Raises:
          UserError: a layer or pad id that there is not, a setting that the module would ignore, or
            shapes that do not go together.
        """
        config, layer = self.config, self.config.layers[0] if self.layer is None else self.layer
        vocabulary = self.vocabulary or CompressedVocabulary.identity(config.vocab_size)
        if not config.compress:
            vocabulary = CompressedVocabulary.identity(vocabulary.lookup.size)
        _check(config, vocabulary, layer, hidden)
        _check_ids("token_ids", token_ids, hidden.shape[:2])
        if position is not None:
            _check_ids("position", position, hidden.shape[:2])
        if history is not None:
            _check_ids("history", history)
        ngrams = NgramHash(
            rows_per_head=config.rows_per_head, heads=config.heads, layers=config.layers,
            vocab_size=vocabulary.size, pad_id=int(vocabulary.lookup[config.pad_id]),
            seed=config.hash_seed)
        layout = TableLayout(
            rows=ngrams.table_rows[layer], dim=config.head_dim, shards=config.shards)
        table = self.param("table", layout.init, config.table_std)
        before_BN = self._before(token_ids, history)
        reach_BT = None if position is None else position + 1
        ids_BTH = ngrams.table_ids(
            vocabulary.canonical(token_ids), layer, reach_BT=reach_BT, history=_canonical(
                vocabulary, ngrams.pad_id, before_BN))
        rows_BTHC = layout.gather(table, ids_BTH)
        rows_BTHC = jnp.where(ids_BTH[..., None] < 0, jnp.nan, rows_BTHC)
        return _fused(self, hidden, rows_BTHC, position)

    def _before(self, token_ids: jax.Array, history: jax.Array | None) -> jax.Array:
        """The raw ids before these, int32 [B, N - 1]; the cache then ends with these."""
        batch, before = token_ids.shape[0], self.config.max_order - 1
        if history is not None:
            require(history.shape[0] == batch and history.shape[1] >= before,
                    "history.shape", history.shape, f"must be [{batch}, at least {before}]")
            history = history[:, history.shape[1] - before:]
        if not self.decode:
            return jnp.full((batch, before), BEFORE) if history is None else history
        going_on = self.has_variable("cache", "history")
        kept = self.variable("cache", "history", jnp.full, (batch, before), BEFORE, jnp.int32)
        before_BN = kept.value if history is None else history
        if going_on:
            joined_BS = jnp.concatenate([before_BN, jnp.asarray(token_ids, jnp.int32)], axis=1)
            kept.value = joined_BS[:, joined_BS.shape[1] - before:]
        return before_BN


def _canonical(
    vocabulary: CompressedVocabulary, pad_id: int, raw_BN: jax.Array
) -> jax.Array:
    """Canonical ids of a history: `pad_id` before the start of the text."""
    raw_BN = jnp.asarray(raw_BN)
    return jnp.where(raw_BN == BEFORE, pad_id, vocabulary.canonical(raw_BN))


def _fused(
    module: EngramFusion | Engram, hidden: jax.Array, rows_BTHC: jax.Array,
    position_BT: jax.Array | None,
) -> jax.Array:
    """The fusion, with the parameters and the cache of `module`."""
    config, streams_BTMD = module.config, as_streams(hidden)
    branches, width = config.branches(streams_BTMD.shape[2]), hidden.shape[-1]
    params = module.param("fusion", init_engram, width, branches, config)
    if not (module.decode and config.conv_reach):
        fused = fuse(params, streams_BTMD, rows_BTHC, config, position_BT)
    else:
        going_on = module.has_variable("cache", "conv")
        shape = hidden.shape[0], config.conv_reach, branches, width
        kept = module.variable("cache", "conv", jnp.zeros, shape, hidden.dtype)
        fused = fuse(params, streams_BTMD, rows_BTHC, config, position_BT, kept.value)
        if going_on:
            kept.value = fused.last_taps(kept.value)
    module.sow("intermediates", "gate", fused.gate_BTM)
    return (streams_BTMD + fused.delta_BTMD).reshape(hidden.shape)


def _check(
    config: EngramConfig, vocabulary: CompressedVocabulary, layer: int, hidden: jax.Array
) -> None:
    """Refuse (UserError) what `Engram` would ignore, a hidden state and ids that cannot be."""
    as_streams(hidden)
    raw_ids = vocabulary.lookup.size
    require(config.keys == "ngrams", "EngramConfig.keys", config.keys,
            "is a control of the training loop; a module of its own has ngrams")
    require(not config.one_table, "EngramConfig.one_table", config.one_table,
            "is of the training loop; a module of its own has a table of its own")
    require(config.table_dtype == "float32", "EngramConfig.table_dtype", config.table_dtype,
            "is of a table that rows are updated in; a module's own table is float32")
    require(layer in config.layers, "Engram.layer", layer, f"must be one of {config.layers}")
    require(config.pad_id < raw_ids, "EngramConfig.pad_id", config.pad_id,
            f"must be a raw token id, in 0..{raw_ids - 1}")


def _check_ids(name: str, ids: jax.Array, batch_time: tuple[int, ...] | None = None) -> None:
    """Refuse (UserError) what are not whole numbers [B, T], of the hidden state's B and T."""
    check_array(name, ids, "whole numbers [B, T]")
    require(ids.ndim == 2 and batch_time in (None, ids.shape), f"{name}.shape", ids.shape,
            f"must be {batch_time}, the first two of hidden's" if batch_time else "must be [B, T]")
    require(bool(jnp.issubdtype(ids.dtype, jnp.integer)), f"{name}.dtype", str(ids.dtype),
            "must be a whole-number type")
