"""The chain of a model with caches, cut where rows are needed: each stage is one dispatch.

Stage 0 embeds the tokens and runs the blocks before the first Engram layer; each further stage
begins with an Engram fusion. So what runs before a fusion can be dispatched while its rows are on
their way. `finish` turns the last stage's streams into tokens.

Shapes: as in `caches` and `transformer`; T tokens of a chunk, of which the first `count` are real.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.hashing.addressing import INPUT_SITE, engram_site
from engram_jax.inference.caches import Keys, SlotState, of_slot, put_slot
from engram_jax.inference.sampling import Sampling, sample
from engram_jax.model import parameters, transformer
from engram_jax.model.attention import cached_attention, latents
from engram_jax.model.engram import fuse
from engram_jax.model.layers import Params, unjoined
from engram_jax.model.transformer import Segment, segments


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is dispatched at once: segments start..stop-1 of the chain.

    Attributes:
      site: whose rows the stage begins with, if any.
      layer: before whose attention its Engram fusion stands, if it has one.
    """

    start: int
    stop: int
    site: str | None
    layer: int | None


def stages(model: ModelConfig) -> tuple[Stage, ...]:
    """The stages of a model; the first has the embedding, and may have no segment."""
    chain = segments(model)
    fused = [number for number, segment in enumerate(chain) if segment.engram]
    cuts = [0, *fused, len(chain)]
    first = INPUT_SITE if model.over_encoding is not None else None
    made = [Stage(0, cuts[1], first, None)]
    for start, stop in itertools.pairwise(cuts[1:]):
        assert model.engram is not None
        layer = chain[start].start
        made.append(Stage(start, stop, engram_site(model.engram, layer), layer))
    return tuple(made)


class Context(NamedTuple):
    """What attention needs of a chunk: positions int32 [B, T], the first that each may look at
    int32 [B, T], and how many tokens are real int32 [B]."""

    positions_BT: jax.Array
    first_BT: jax.Array
    count_B: jax.Array


def advance(
    state: SlotState, tokens_BT: jax.Array, count_B: jax.Array, end_id: int | None
) -> tuple[Context, SlotState]:
    """The positions of a chunk, and how far the sequences are after it.

    `end_id`: the token after which a document begins, for a model that isolates documents.
    """
    at_1T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    positions_BT = state.length_B[:, None] + at_1T
    first_BT = jnp.broadcast_to(state.first_B[:, None], positions_BT.shape)
    if end_id is not None:
        before_BT = jnp.concatenate([state.last_B[:, None], tokens_BT[:, :-1]], axis=1)
        starts_BT = jnp.where(before_BT == end_id, positions_BT, 0)
        first_BT = jnp.maximum(first_BT, jax.lax.cummax(starts_BT, axis=1))
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    first_B, last_B = (
        jnp.where(count_B > 0, jnp.take_along_axis(new_BT, last_B1, axis=1)[:, 0], old_B)
        for new_BT, old_B in ((first_BT, state.first_B), (tokens_BT, state.last_B)))
    return (Context(positions_BT, first_BT, count_B),
            SlotState(state.length_B + count_B, first_B, last_B))


def _last(before_BP: jax.Array, new_BT: jax.Array, count_B: jax.Array) -> jax.Array:
    """The last P entries along time once the first `count` of the new ones have come."""
    joined_BS = jnp.concatenate([before_BP, new_BT], axis=1)
    at_BP = count_B[:, None] + jnp.arange(before_BP.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(
        joined_BS, jnp.expand_dims(at_BP, range(2, joined_BS.ndim)), axis=1)


@functools.partial(jax.jit, static_argnames=("model", "end_id"), donate_argnames=("keys", "state"))
def begin(
    params: dict[str, Any],
    bias: list[jax.Array | None],
    keys: list[Keys],
    state: SlotState,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    rows_BTHC: jax.Array | None,
    slot: jax.Array | None,
    *,
    model: ModelConfig,
    end_id: int | None,
) -> tuple[jax.Array, list[Keys], SlotState, Context]:
    """Stage 0: tokens to streams.

    Args:
      params: the model's, cut to this stage's segments (`stage_params`).
      bias: the router biases of the same segments.
      keys: of the same segments, all slots.
      state: of all slots.
      tokens_BT: int32; of all slots, or of one.
      count_B: how many of them are real; the others leave nothing behind.
      rows_BTHC: of the input's memory, if the model has one.
      slot: the one slot that the tokens are of; None for all.
      model, end_id: static.

    Returns:
      Streams [B, T, M, D], keys and state after the chunk, and the chunk's context.
    """
    context, moved = advance(of_slot(state, slot, 0), tokens_BT, count_B, end_id)
    rows = {} if rows_BTHC is None else {INPUT_SITE: rows_BTHC}
    x_BTMD = transformer.embed(params, tokens_BT, rows, model)
    x_BTMD, keys, _ = _run(
        params["segments"], bias, keys, None, x_BTMD, None, context, slot, model, 0)
    return x_BTMD, keys, put_slot(state, moved, slot, 0), context


@functools.partial(
    jax.jit, static_argnames=("model", "start"), donate_argnames=("keys", "conv_BPMD"))
def proceed(
    params: list[dict[str, Any]],
    bias: list[jax.Array | None],
    keys: list[Keys],
    conv_BPMD: jax.Array | None,
    x_BTMD: jax.Array,
    rows_BTHC: jax.Array,
    context: Context,
    slot: jax.Array | None,
    *,
    model: ModelConfig,
    start: int,
) -> tuple[jax.Array, list[Keys], jax.Array | None]:
    """A further stage, whose first segment is number `start`: fusion, then blocks."""
    return _run(params, bias, keys, conv_BPMD, x_BTMD, rows_BTHC, context, slot, model, start)


def _run(
    params: list[dict[str, Any]], bias: list[jax.Array | None], keys: list[Keys],
    conv_BPMD: jax.Array | None, x_BTMD: jax.Array, rows_BTHC: jax.Array | None, context: Context,
    slot: jax.Array | None, model: ModelConfig, start: int,
) -> tuple[jax.Array, list[Keys], jax.Array | None]:
    """The segments of a stage: (streams, keys, what the convolution read)."""
    chain = segments(model)[start : start + len(params)]
    after = []
    for segment, own, bias_LE, kept in zip(chain, params, bias, keys, strict=True):
        if segment.engram:
            assert rows_BTHC is not None
            part_BPMD = of_slot(conv_BPMD, slot, 0)
            x_BTMD, part_BPMD = _fuse(own["engram"], x_BTMD, rows_BTHC, part_BPMD, context, model)
            conv_BPMD = put_slot(conv_BPMD, part_BPMD, slot, 0)
        x_BTMD, part = _blocks(
            own["blocks"], bias_LE, of_slot(kept, slot, 1), x_BTMD, segment, context, model)
        after.append(put_slot(kept, part, slot, 1))
    return x_BTMD, after, conv_BPMD


def _fuse(
    params: Params, x_BTMD: jax.Array, rows_BTHC: jax.Array, conv_BPMD: jax.Array | None,
    context: Context, model: ModelConfig,
) -> tuple[jax.Array, jax.Array | None]:
    assert model.engram is not None
    position_BT = (context.positions_BT - context.first_BT) if model.isolate_documents else None
    fused = fuse(params, x_BTMD, rows_BTHC, model.engram, position_BT, conv_BPMD)
    if conv_BPMD is not None:
        assert fused.taps_BTMD is not None
        conv_BPMD = _last(conv_BPMD, fused.taps_BTMD, context.count_B)
    return x_BTMD + fused.delta_BTMD, conv_BPMD


def _blocks(
    params: dict[str, Any], bias_LE: jax.Array | None, keys: Keys, x_BTMD: jax.Array,
    segment: Segment, context: Context, model: ModelConfig,
) -> tuple[jax.Array, Keys]:
    """A segment's blocks; the keys are carried, so that each block writes into them in state.

    The number of the block is the loop's own counter. A scan's, which is read from an array, tells
    XLA on GPUs too little to let products read the keys where they are: it copied them.
    """

    def one(number: jax.Array, carry: tuple[jax.Array, Keys]) -> tuple[jax.Array, Keys]:
        x_BTMD, keys = carry

        def of_block(stacked: Any) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(
                leaf, number, keepdims=False), stacked)

        def attend(params: Params, x_BTD: jax.Array) -> tuple[jax.Array, Keys]:
            new = latents(
                params, unjoined(x_BTD), context.positions_BT, model.attention, model.norm_eps)
            written = _written(keys, number, new, context)
            own = of_block(written)
            return cached_attention(
                params, x_BTD, own.latent_LBSC, own.shared_LBSR, context.positions_BT,
                context.first_BT, model.attention), written

        x_BTMD, keys, _ = transformer.block(
            of_block(params), x_BTMD, of_block(bias_LE), attend, model)
        return x_BTMD, keys

    return jax.lax.fori_loop(0, segment.depth, one, (x_BTMD, keys))


def _written(
    keys: Keys, number: jax.Array, new: tuple[jax.Array, jax.Array], context: Context
) -> Keys:
    """Block `number`'s keys with those of the chunk's real tokens at their positions."""
    at_BT = _places(context, keys.latent_LBSC.shape[2])
    slot_B1 = jnp.arange(at_BT.shape[0], dtype=jnp.int32)[:, None]
    return Keys(*(leaf.at[number, slot_B1, at_BT].set(
        part.astype(leaf.dtype), mode="drop", unique_indices=True)
        for leaf, part in zip(keys, new, strict=True)))


def _places(context: Context, length: int) -> jax.Array:
    """Where the tokens' keys are written, int32 [B, T]; from `length` on it is nowhere.

    No two tokens of a sequence have the same, not even those that are dropped. A GPU that is told
    so sorts nothing to keep the order of writes.
    """
    at_1T = jnp.arange(context.positions_BT.shape[1], dtype=jnp.int32)[None]
    real_BT = at_1T < context.count_B[:, None]
    return jnp.where(real_BT, context.positions_BT, length + at_1T)


@functools.partial(jax.jit, static_argnames=("model", "known", "greedy"))
def finish(
    params: dict[str, Any],
    x_BTMD: jax.Array,
    context: Context,
    sampling: Sampling,
    tokens_B: jax.Array,
    slot: jax.Array | None,
    *,
    model: ModelConfig,
    known: int,
    greedy: bool,
) -> jax.Array:
    """The token after each sequence's last real one, int32 [B]; others keep what they had.

    Args:
      params: what `transformer.head` reads.
      x_BTMD: of the last stage.
      context: of the chunk.
      sampling: of all slots.
      tokens_B: the tokens before, of all slots.
      slot: as in `begin`.
      model: static.
      known: static; ids from it on are never taken (the model has room for more than the
        tokenizer knows).
      greedy: static; as `sample` takes it, of the slots that the tokens are of.
    """
    logits_BV = last_logits(params, x_BTMD, context, model)[:, :known]
    last_B = context.positions_BT[:, 0] + context.count_B
    drawn_B = sample(logits_BV, of_slot(sampling, slot, 0), last_B, greedy)
    kept_B = of_slot(tokens_B, slot, 0)
    return put_slot(tokens_B, jnp.where(context.count_B > 0, drawn_B, kept_B), slot, 0)


def last_logits(
    params: dict[str, Any], x_BTMD: jax.Array, context: Context, model: ModelConfig
) -> jax.Array:
    """Logits after each sequence's last real token, float32 [B, V]."""
    last_B111 = jnp.maximum(context.count_B - 1, 0)[:, None, None, None]
    return transformer.head(params, jnp.take_along_axis(x_BTMD, last_B111, axis=1), model)[:, 0]


def serving_params(params: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The parameters as inference keeps them: matrices in the dtype that they are used in."""
    return parameters.each(
        lambda parameter, leaf: leaf.astype(model.compute_dtype) if parameter.cast else leaf,
        transformer.declared(model), params)


def stage_params(params: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The parameters with this stage's segments alone."""
    return {**params, "segments": params["segments"][stage.start : stage.stop]}
