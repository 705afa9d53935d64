"""What a sequence leaves behind for its next token, in slots of fixed size.

For each position attention keeps the compressed latent and one rotated key (MLA); the convolution
of an Engram module keeps what it read at the last few positions, and the hash the last few tokens.
A slot holds one sequence; all functions are pure.

Shapes: L blocks of a segment, B slots, S positions of a slot, C latent rank, R rotary dim, P
positions that the convolution looks back, M streams, D width, H tokens of history.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.hashing.addressing import sites
from engram_jax.model.transformer import segments


class Keys(NamedTuple):
    """Of one segment: latents [L, B, S, C] and rotated keys [L, B, S, R], in the compute dtype."""

    latent_LBSC: jax.Array
    shared_LBSR: jax.Array


class Place(NamedTuple):
    """Where each sequence is, all int32.

    Attributes:
      length_B: tokens that the cache has of it.
      first_B: position of the first token of the document that it is in; 0 unless the model
        isolates documents.
      history_BH: its last raw tokens, oldest first; the pad token before the start.
    """

    length_B: jax.Array
    first_B: jax.Array
    history_BH: jax.Array


class Cache(NamedTuple):
    """Of all slots: keys of each segment, what each Engram layer's convolution read
    [B, P, M, D], and the places."""

    keys: list[Keys]
    conv: dict[int, jax.Array]
    place: Place


def history_length(model: ModelConfig) -> int:
    """H: tokens before a chunk that its n-grams reach, or that tell where a document starts."""
    return max([1, *(site.hash_config.max_order - 1 for site in sites(model))])


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
    return Cache(keys, conv, Place(zeros_B, zeros_B.copy(), jnp.full(
        (slots, history_length(model)), pad_id, jnp.int32)))


def cleared(cache: Cache, slot: jax.Array | int, pad_id: int) -> Cache:
    """The cache with a slot as at a sequence's start; what keys it holds are never looked at."""
    return cache._replace(
        conv=jax.tree.map(lambda leaf: leaf.at[slot].set(0), cache.conv),
        place=Place(cache.place.length_B.at[slot].set(0), cache.place.first_B.at[slot].set(0),
                    cache.place.history_BH.at[slot].set(pad_id)))


def fork(cache: Cache, source: jax.Array | int, target: jax.Array | int) -> Cache:
    """The cache with the sequence of one slot in another, too."""
    keys = jax.tree.map(lambda leaf: leaf.at[:, target].set(leaf[:, source]), cache.keys)
    rest = jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source]), (cache.conv, cache.place))
    return Cache(keys, *rest)


class Mark(NamedTuple):
    """A point of a sequence to come back to: all of its slot but the keys, which stay."""

    conv: dict[int, jax.Array]
    place: Place


def mark(cache: Cache, slot: jax.Array | int) -> Mark:
    """The point that the slot's sequence is at."""
    return Mark(*jax.tree.map(lambda leaf: leaf[slot], (cache.conv, cache.place)))


def rewind(cache: Cache, slot: jax.Array | int, point: Mark) -> Cache:
    """The cache with a slot's sequence back at a point that it has passed."""
    rest = jax.tree.map(lambda leaf, kept: leaf.at[slot].set(kept), (cache.conv, cache.place),
                        (point.conv, point.place))
    return Cache(cache.keys, *rest)


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
