"""What happens inside a trained model on a text: streams after every block, and gates.

The same functions as in training, block after block where training scans.

Shapes: B batch, T time, M streams, D width, V vocabulary, L blocks.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding

from engram_jax.config import ModelConfig, RunConfig
from engram_jax.hashing.addressing import engram_site
from engram_jax.model import transformer
from engram_jax.model.documents import documents
from engram_jax.model.layers import as_they_are
from engram_jax.model.loss import token_losses
from engram_jax.model.transformer import Segment, head_params, segments
from engram_jax.runs.checkpoints import last_checkpoint
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import Reader, reader_of
from engram_jax.settings import changed
from engram_jax.tables.layout import gather_rows
from engram_jax.training.placement import placed_state, serving_mesh
from engram_jax.training.state import READ, TrainState


class Observation(NamedTuple):
    """One pass over a batch.

    Attributes:
      streams: L + 1 arrays [B, T, M, D]: after the embedding, and after each block.
      gates: for each Engram layer, float32 [B, T, M].
    """

    streams: list[jax.Array]
    gates: dict[int, jax.Array]


class Patch(NamedTuple):
    """Streams [M, D] that take the place of position `position` after block `layer` (-1: after the
    embedding), in every sequence."""

    streams_MD: jax.Array
    layer: jax.Array | int
    position: jax.Array | int

    def put(self, x_BTMD: jax.Array, layer: int) -> jax.Array:
        """The streams after block `layer`, patched if that is where."""
        here_T = (jnp.arange(x_BTMD.shape[1]) == self.position) & (self.layer == layer)
        return jnp.where(here_T[None, :, None, None], self.streams_MD[None, None], x_BTMD)


@functools.partial(jax.jit, static_argnames="config")
def observe(
    params: dict[str, Any],
    router_bias: list[jax.Array | None],
    tokens_BT: jax.Array,
    rows: dict[str, jax.Array],
    config: ModelConfig,
    starts_BT: jax.Array | None = None,
    patch: Patch | None = None,
) -> Observation:
    """Run the network and keep what is inside; arguments of `transformer.apply`, and a patch."""
    docs = documents(starts_BT) if config.isolate_documents and starts_BT is not None else None

    def patched(x_BTMD: jax.Array, layer: int) -> jax.Array:
        return x_BTMD if patch is None else patch.put(x_BTMD, layer)

    x_BTMD = patched(transformer.embed(params, tokens_BT, rows, config), -1)
    streams, gates = [x_BTMD], {}
    for segment, part, bias_LE in zip(
        segments(config), params["segments"], router_bias, strict=True
    ):
        for offset in range(segment.depth):
            one = Segment(segment.start + offset, segment.start + offset + 1, segment.experts,
                          segment.engram and offset == 0)
            rows_BTHC = None
            if one.engram:
                assert config.engram is not None
                rows_BTHC = rows[engram_site(config.engram, one.start)]
            x_BTMD, _, gate_BTM = transformer.run_segment(
                _block(part, offset), x_BTMD, rows_BTHC,
                None if bias_LE is None else bias_LE[offset : offset + 1], one, config, docs)
            x_BTMD = patched(x_BTMD, one.start)
            streams.append(x_BTMD)
            if gate_BTM is not None:
                gates[one.start] = gate_BTM
    return Observation(streams, gates)


def _network(config: ModelConfig) -> ModelConfig:
    """The config with all that `observe` does not read of a memory, whose rows it is given, set to
    the same: runs that differ in their tables alone share one compiled program."""
    alike: dict[str, Any] = {"hash_seed": 0, "compress": True, "shards": 1,
                             "table_std": 0.0, "table_dtype": "float32", "keys": "ngrams"}
    engram, over = config.engram, config.over_encoding
    if engram is not None:
        engram = changed(engram, {"rows_per_head": (2,) * len(engram.rows_per_head),
                                  "vocab_size": 1, "pad_id": 0, **alike})
    if over is not None:
        over = changed(over, {"rows_per_head": (2,) * len(over.rows_per_head), **alike})
    return changed(config, {"engram": engram, "over_encoding": over})


def _block(part: dict[str, Any], offset: int) -> dict[str, Any]:
    """A segment's parameters with one of its blocks."""
    blocks = jax.tree.map(lambda leaf: leaf[offset : offset + 1], part["blocks"])
    return {**part, "blocks": blocks}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A trained run, to be looked into.

    Attributes:
      run, reader: its config, and how it reads text.
      state: its last checkpoint, split over the mesh.
      fingerprint: of the text that it was trained on; "" if that is not known.
    """

    run: RunConfig
    reader: Reader
    state: TrainState
    fingerprint: str = ""

    @property
    def name(self) -> str:
        return self.run.name

    def rows(self, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        """For each site its rows [B, T, H, C]; sequences begin at their start."""
        ids = self.reader.addressing.ids(tokens_BT)
        return gather_rows(self.run.model, self.state.tables, ids)

    def observe(
        self, tokens_BT: np.ndarray, scale: float = 1.0, patch: "Patch | None" = None
    ) -> Observation:
        """One pass over a batch of tokens, int32 [B, T].

        Args:
          tokens_BT: each sequence is a document's beginning.
          scale: of what memory gives; 0 takes it away.
          patch: put into the streams on the way.
        """
        tokens = jnp.asarray(tokens_BT, jnp.int32)
        rows = jax.tree.map(lambda leaf: scale * leaf, self.rows(tokens))
        starts = jnp.zeros(tokens.shape, bool).at[:, 0].set(True)
        return observe(self.state.params, self.state.router_bias, tokens, rows,
                       _network(self.run.model), starts, patch)

    def head(self, x_BTMD: jax.Array) -> jax.Array:
        """Logits float32 [B, T, V], read off any layer's streams as off the last's."""
        return _head(self._head_params(), x_BTMD, _only_head(self.run.model))

    def losses(self, x_BTMD: jax.Array, targets_BT: np.ndarray) -> jax.Array:
        """Nats of each target, float32 [B, T], read off streams as `head` reads them."""
        return _losses(self._head_params(), x_BTMD, jnp.asarray(targets_BT, jnp.int32),
                       _only_head(self.run.model))

    def _head_params(self) -> dict[str, Any]:
        return head_params(self.state.params, self.run.model, as_they_are)

    def encoded(self, text: str) -> Encoding:
        """A text cut into tokens as in training: nothing is put before it or behind it."""
        return self.reader.tokenizer.encode(text, add_special_tokens=False)

    def tokens(self, text: str) -> np.ndarray:
        """Raw ids of a text, int32 [T]."""
        return np.array(self.encoded(text).ids, np.int32)


@functools.partial(jax.jit, static_argnames="config")
def _head(params: dict[str, Any], x_BTMD: jax.Array, config: ModelConfig) -> jax.Array:
    return transformer.head(params, x_BTMD, config)


@functools.partial(jax.jit, static_argnames="config")
def _losses(
    params: dict[str, Any], x_BTMD: jax.Array, targets_BT: jax.Array, config: ModelConfig
) -> jax.Array:
    return token_losses(params, x_BTMD, targets_BT, config)


def _only_head(config: ModelConfig) -> ModelConfig:
    """The config with what the head does not read set to the same for all runs."""
    return changed(config, {"engram": None, "over_encoding": None, "moe": None, "ffn": 1,
                            "depth": 1})


def open_run(records: RunDirectory, mesh: str | None = None) -> Opened:
    """The last checkpoint of a run.

    Args:
      records: of the run.
      mesh: as `serving_mesh` takes it.

    Raises:
      UserError: no run, no checkpoint in it, or as `serving_mesh`.
      MachineError: what is there cannot be read.
    """
    run = records.config()
    reader = reader_of(records)
    with last_checkpoint(records, reader) as checkpoint:
        state = checkpoint.restore(placed_state(run, serving_mesh(run, mesh)), only=READ)
    return Opened(run=run, reader=reader, state=state,
                  fingerprint=str(records.env().get("data_fingerprint", "")))
