"""The language model: embed -> segment -> segment -> ... -> head, with rows as an input.

A segment is an optional Engram fusion followed by a run of alike blocks (one scan). Training
composes the chain in one jit; inference may dispatch it segment by segment.

Parameters, all float32:
  embedding [V, D]; head [D, V] unless tied; final_gain [D]; over_encoding, if any;
  segments: a list with, for each segment, `blocks` (every leaf stacked over the segment's L
  blocks) and `engram`, if it begins with one.

Shapes: B batch, T time, M streams, D width, V vocabulary, H rows of a token, C columns of a row,
L blocks of a segment, E experts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.hashing.addressing import INPUT_SITE, engram_site
from engram_jax.model import hyper_connections, over_encoding
from engram_jax.model.attention import attention, attention_parameters
from engram_jax.model.attention_kernels import RESIDUALS
from engram_jax.model.documents import Documents, documents
from engram_jax.model.engram import engram_parameters, fuse
from engram_jax.model.hyper_connections import Streams
from engram_jax.model.layers import (
    Params,
    Whole,
    as_they_are,
    ffn,
    ffn_parameters,
    rms_norm,
    rows_of,
    wide_linear,
)
from engram_jax.model.moe import Routed, experts_here, moe, moe_parameters
from engram_jax.model.parameters import Declared, counted_as, embedding, values, vector
from engram_jax.model.sequence import Stretch, alone


@dataclasses.dataclass(frozen=True)
class Segment:
    """Blocks start..stop-1, all dense or all with experts; `engram`: a fusion comes first."""

    start: int
    stop: int
    experts: bool
    engram: bool

    @property
    def depth(self) -> int:
        return self.stop - self.start


def segments(config: ModelConfig) -> tuple[Segment, ...]:
    """The chain of a model: cut before each Engram layer and where experts begin."""
    fused = set(config.engram.layers) if config.engram else set()
    first_expert = config.moe.dense_layers if config.moe else config.depth
    cuts = sorted({0, first_expert, config.depth} | fused)
    return tuple(Segment(start, stop, start >= first_expert, start in fused)
                 for start, stop in itertools.pairwise(cuts))


def init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """The parameter tree, without tables."""
    return values(_declare(config, key))


@functools.lru_cache(maxsize=64)
def declared(config: ModelConfig) -> Declared:
    """The same tree of `Parameter`, with shapes and dtypes in the place of arrays."""
    return jax.eval_shape(lambda: _declare(config, jax.random.key(0)))


def _declare(config: ModelConfig, key: jax.Array) -> Declared:
    embed_key, head_key, over_key, blocks_key, engram_key = jax.random.split(key, 5)
    width = config.width
    declared: Declared = {
        "embedding": counted_as("token embedding", embedding(
            embed_key, (config.vocab_size, width), config.embedding_std)),
        "final_gain": counted_as("norms", vector(jnp.ones(width))),
        "segments": [_declare_segment(config, segment, blocks_key, engram_key)
                     for segment in segments(config)],
    }
    if not config.tied_head:
        declared["head"] = counted_as(
            "LM head", embedding(head_key, (width, config.vocab_size), width**-0.5))
    if config.over_encoding is not None:
        declared["over_encoding"] = counted_as(
            "over-encoding projections",
            over_encoding.over_encoding_parameters(over_key, width, config.over_encoding))
    return declared


def _declare_segment(
    config: ModelConfig, segment: Segment, blocks_key: jax.Array, engram_key: jax.Array
) -> Declared:
    # Keys depend on the block's number alone: models that differ in their memory start alike.
    numbers = jnp.arange(segment.start, segment.stop)
    keys = jax.vmap(functools.partial(jax.random.fold_in, blocks_key))(numbers)
    declare_block = functools.partial(_declare_block, config, segment)
    declared: Declared = {"blocks": jax.vmap(declare_block)(keys)}
    if segment.engram:
        assert config.engram is not None
        declared["engram"] = engram_parameters(
            jax.random.fold_in(engram_key, segment.start), config.width,
            config.engram.branches(config.streams), config.engram)
    return declared


def _declare_block(config: ModelConfig, segment: Segment, key: jax.Array) -> Declared:
    attention_key, ffn_key, mix_a, mix_f = jax.random.split(key, 4)
    width = config.width
    second: Declared
    if segment.experts:
        assert config.moe is not None
        second = {"moe": moe_parameters(ffn_key, width, config.moe)}
    else:
        second = {"ffn": counted_as("dense FFN", ffn_parameters(ffn_key, width, config.ffn))}
    gain, mix = vector(jnp.ones(width)), functools.partial(
        hyper_connections.mixing_parameters, width=width, streams=config.streams)
    return {
        "attention": counted_as(
            "attention", attention_parameters(attention_key, width, config.attention)),
        "attention_gain": counted_as("norms", gain),
        "attention_mixing": counted_as("hyper-connections", mix(mix_a)),
        "ffn_gain": counted_as("norms", gain),
        "ffn_mixing": counted_as("hyper-connections", mix(mix_f)),
        **second,
    }


def init_router_bias(config: ModelConfig) -> list[jax.Array | None]:
    """The balancing biases, float32 [L, E] for each segment with experts, None for others."""
    return [jnp.zeros((segment.depth, config.moe.experts), jnp.float32)
            if segment.experts and config.moe else None for segment in segments(config)]


class Observed(NamedTuple):
    """What a forward pass lets one see.

    Attributes:
      loads: for each segment, the assignments of each expert, int32 [L, E], or None.
      gates: for each Engram layer, float32 [B, T, M].
    """

    loads: list[jax.Array | None]
    gates: dict[int, jax.Array]


@jax.named_scope("embed")
def embed(
    params: dict[str, Any],
    tokens_BT: jax.Array,
    rows: dict[str, jax.Array],
    config: ModelConfig,
    whole: Whole = as_they_are,
) -> jax.Array:
    """The residual streams before the first block, [B, T, M, D] in the compute dtype."""
    embedded_BTD = rows_of(whole(params["embedding"], "embedding"), tokens_BT).astype(
        config.compute_dtype)
    if config.over_encoding is not None:
        projections = whole(params["over_encoding"], "over_encoding")
        embedded_BTD = over_encoding.encode(projections, embedded_BTD, rows[INPUT_SITE])
    return hyper_connections.split(embedded_BTD, config.streams)


def run_segment(
    params: dict[str, Any],
    x_BTMD: jax.Array,
    rows_BTHC: jax.Array | None,
    bias_LE: jax.Array | None,
    segment: Segment,
    config: ModelConfig,
    docs: Documents | None,
    whole: Whole = as_they_are,
    routed: Routed = experts_here,
    stretch: Stretch = alone,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """One segment: (streams, loads [L, E] or None, gates [B, T, M] or None).

    `whole` knows the segment's own parameters by "engram" and "blocks"; `routed` brings tokens and
    experts together; `docs` are of whole sequences, of which these are a `stretch`.
    """
    gate_BTM = None
    if segment.engram:
        assert config.engram is not None
        assert rows_BTHC is not None
        with jax.named_scope("fusion"):
            weights = whole(params["engram"], "engram")
        fuse_here = fuse
        if config.remat != "none":
            fuse_here = jax.checkpoint(fuse, static_argnums=(3, 6))
        position_BT = None if docs is None else stretch.own(docs.position_BT)
        fused = fuse_here(
            weights, x_BTMD, rows_BTHC, config.engram, position_BT, None, stretch)
        x_BTMD, gate_BTM = x_BTMD + fused.delta_BTMD, fused.gate_BTM

    def plain(
        params: dict[str, Any], x: Streams, bias_E: jax.Array | None
    ) -> tuple[Streams, jax.Array | None]:
        params = whole(params, "blocks")
        x, _, load_E = block(params, x, bias_E, attend, config, routed)
        return x, load_E

    def attend(params: Params, x_BTD: jax.Array) -> tuple[jax.Array, None]:
        number_BT = None if docs is None else docs.number_BT
        return attention(
            params, x_BTD, config.attention, config.norm_eps, number_BT, stretch), None

    run = plain
    if config.remat != "none":
        run = jax.checkpoint(plain, policy=_KEPT[config.remat])
    layout = hyper_connections.stream_layout(config, jax.local_devices()[0])
    x: Any = hyper_connections.laid_out(x_BTMD, layout)
    x, load_LE = jax.lax.scan(
        lambda x, inputs: run(inputs[0], x, inputs[1]), x, (params["blocks"], bias_LE))
    return hyper_connections.joined(x), load_LE, gate_BTM


FFN_OUTPUT = "ffn_output"
# What is kept for the backward pass, beside each block's input.
_KEPT = {
    remat: jax.checkpoint_policies.save_only_these_names(hyper_connections.MIXING, *names)
    for remat, names in {
        "block": (),
        "ffn": (FFN_OUTPUT,),
        "outputs": (FFN_OUTPUT, hyper_connections.OUTPUT, RESIDUALS),
        "auto": (),
    }.items()}


def block(
    params: dict[str, Any],
    x: Streams,
    bias_E: jax.Array | None,
    attend: Callable[[Params, jax.Array], tuple[jax.Array, Any]],
    config: ModelConfig,
    routed: Routed = experts_here,
) -> tuple[Streams, Any, jax.Array | None]:
    """Attention and FFN, each wrapped in its hyper-connection.

    `attend` maps its parameters and the normalised input to [B, T, D] and anything beside it.

    Returns:
      The streams, what `attend` gave beside them, and the experts' loads [E] or None.
    """

    def attended(x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        normed = rms_norm(x_BTD, params["attention_gain"], config.norm_eps)
        return attend(params["attention"], normed)

    def feed(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        normed = rms_norm(x_BTD, params["ffn_gain"], config.norm_eps)
        if bias_E is None:
            return ffn(params["ffn"], normed), None
        assert config.moe is not None
        return moe(params["moe"], normed, bias_E, config.moe, routed)

    connect = functools.partial(
        hyper_connections.connect, rounds=config.sinkhorn_rounds, eps=config.norm_eps)
    x, beside = connect(params["attention_mixing"], x, attended)
    x, load_E = connect(params["ffn_mixing"], x, feed, output=FFN_OUTPUT)
    return x, beside, load_E


@jax.named_scope("head")
def head(params: dict[str, Any], x_BTMD: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits, float32 [B, T, V]."""
    merged_BTD = hyper_connections.merge(x_BTMD)
    normed_BTD = rms_norm(merged_BTD, params["final_gain"], config.norm_eps)
    weight_DV = params["embedding"].T if config.tied_head else params["head"]
    return wide_linear(normed_BTD, weight_DV)


def head_params(params: dict[str, Any], config: ModelConfig, whole: Whole) -> dict[str, Any]:
    """What `head` reads, whole."""
    name = "embedding" if config.tied_head else "head"
    return {"final_gain": params["final_gain"], name: whole(params[name], name)}


def body(
    params: dict[str, Any],
    tokens_BT: jax.Array,
    rows: dict[str, jax.Array],
    router_bias: list[jax.Array | None],
    config: ModelConfig,
    starts_BT: jax.Array | None = None,
    whole: Whole = as_they_are,
    routed: Routed = experts_here,
    stretch: Stretch = alone,
) -> tuple[jax.Array, Observed]:
    """Tokens and rows to the streams after the last block, [B, T, M, D]; arguments of `apply`.

    `stretch` is of the sequences that the tokens, rows and starts are.
    """
    docs = None
    if config.isolate_documents:
        assert starts_BT is not None, "a model that isolates documents needs starts_BT"
        docs = documents(stretch.everywhere(starts_BT))
    x_BTMD = embed(params, tokens_BT, rows, config, whole)
    loads: list[jax.Array | None] = []
    gates: dict[int, jax.Array] = {}
    for number, (segment, part, bias_LE) in enumerate(zip(
        segments(config), params["segments"], router_bias, strict=True
    )):
        rows_BTHC = None
        if segment.engram:
            assert config.engram is not None
            rows_BTHC = rows[engram_site(config.engram, segment.start)]
        x_BTMD, load_LE, gate_BTM = run_segment(
            part, x_BTMD, rows_BTHC, bias_LE, segment, config, docs,
            lambda tree, *path, number=number: whole(tree, "segments", number, *path),
            routed, stretch)
        loads.append(load_LE)
        if gate_BTM is not None:
            gates[segment.start] = gate_BTM
    return x_BTMD, Observed(loads, gates)


def apply(
    params: dict[str, Any],
    tokens_BT: jax.Array,
    rows: dict[str, jax.Array],
    router_bias: list[jax.Array | None],
    config: ModelConfig,
    starts_BT: jax.Array | None = None,
) -> tuple[jax.Array, Observed]:
    """Tokens and rows to logits.

    Args:
      params: as `init` makes them.
      tokens_BT: int32 ids below the vocabulary's size.
      rows: for each site of `hashing.addressing`, its rows [B, T, H, C].
      router_bias: as `init_router_bias` makes them.
      config: the model.
      starts_BT: bool, true on the first token of a document; read only when the model isolates
        documents.

    Returns:
      Logits float32 [B, T, V], and what could be observed on the way.
    """
    x_BTMD, seen = body(params, tokens_BT, rows, router_bias, config, starts_BT)
    return head(params, x_BTMD, config), seen
