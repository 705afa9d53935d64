"""What a sequence leaves behind for its next token, in slots of fixed size.

For each position attention keeps the compressed latent and one rotated key (MLA); the convolution
of an Engram module keeps what it read at the last few positions. The last few tokens, which the
hash reads, stay on the host (`engine`). A slot holds one sequence; all functions are pure.

Shapes: L blocks of a segment, B slots, S positions of a slot, C latent rank, R rotary dim, P
positions that the convolution looks back, M streams, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.model.transformer import segments


class Keys(NamedTuple):
    """What the attention of a segment keeps, in the compute dtype: latents [L, B, S, C] and rotated
    keys [L, B, S, R]."""

    latent_LBSC: jax.Array
    shared_LBSR: jax.Array


class SlotState(NamedTuple):
    """How far each sequence is, all int32.

    Attributes:
      length_B: tokens that the cache has of it.
      first_B: position of the first token of the document that it is in; 0 unless the model
        isolates documents.
      last_B: its last raw token; the pad token before the start.
    """

    length_B: jax.Array
    first_B: jax.Array
    last_B: jax.Array


class Cache(NamedTuple):
    """What all slots hold: keys of each segment, what each Engram layer's convolution read
    [B, P, M, D], and how far each sequence is."""

    keys: list[Keys]
    conv: dict[int, jax.Array]
    state: SlotState


def init_cache(model: ModelConfig, slots: int, length: int, pad_id: int) -> Cache:
    """Empty slots of `length` positions; `pad_id` is the raw token before the start."""
    dtype, attention = model.compute_dtype, model.attention
    keys = [Keys(*(jnp.zeros((segment.depth, slots, length, size), dtype)
                   for size in (attention.kv_rank, attention.rope_dim)))
            for segment in segments(model)]
    conv = {}
    if model.engram is not None and model.engram.conv_reach:
        branches = model.engram.branches(model.streams)
        shape = slots, model.engram.conv_reach, branches, model.width
        conv = {layer: jnp.zeros(shape, dtype) for layer in model.engram.layers}
    zeros_B = jnp.zeros(slots, jnp.int32)
    return Cache(keys, conv, SlotState(
        zeros_B, zeros_B.copy(), jnp.full(slots, pad_id, jnp.int32)))


def cleared(cache: Cache, slot: jax.Array | int, pad_id: int) -> Cache:
    """The cache with a slot as at a sequence's start; what keys it holds are never looked at."""
    return cache._replace(
        conv=jax.tree.map(lambda leaf: leaf.at[slot].set(0), cache.conv),
        state=SlotState(*(leaf.at[slot].set(value) for leaf, value in
                          zip(cache.state, (0, 0, pad_id), strict=True))))


def of_slot(tree: Any, slot: jax.Array | None, axis: int) -> Any:
    """Leaves cut to one slot, whose axis keeps size 1; None leaves all slots."""
    if slot is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot, 1, axis), tree)


def put_slot(tree: Any, part: Any, slot: jax.Array | None, axis: int) -> Any:
    """The inverse of `of_slot`: `tree` with the slot's leaves replaced."""
    if slot is None:
        return part
    return jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, slot, axis), tree, part)
