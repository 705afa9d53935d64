"""The memory of a training step that is not ours: look up, combine, update.

A guest's step is an ordinary `jax.jit` over global arrays; the `jax.shard_map` is inside the verbs.

    memory = Memory(config, vocabulary, mesh=mesh, optimizer=row_rmsprop())
    tables = memory.init(jax.random.key(0))                 # once, outside of the step

    lookup = memory.lookup(tables, tokens)                  # in the step
    loss, (grads, row_grads) = jax.value_and_grad(loss_fn, (0, 1))(params, lookup.rows, tokens)
    combined = memory.combine(lookup, row_grads)
    tables = memory.update(tables, combined, learning_rate)

The loss is the mean over the whole batch, as one writes it for one device; nothing is summed or
divided by the number of devices.

Shapes: B batch, T time, H = (N - 1) * K rows of a token, C columns of a row, S shards, R rows of a
shard, P devices that share the tables, A look-ups that are combined.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import EngramConfig, require
from engram_jax.hashing.addressing import Addressing, Site, address, engram_site, sites
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.tables import collectives
from engram_jax.tables.exchange import ROOM
from engram_jax.tables.layout import layout_of
from engram_jax.tables.local import LocalMemory
from engram_jax.tables.lookup import (
    Combined,
    Lookup,
    Tables,
    as_scalar,
    check_devices,
    check_tables,
    in_one,
    refuse_shard_map,
)
from engram_jax.tables.row_optimizers import RowOptimizer, row_rmsprop


@dataclasses.dataclass(frozen=True)
class Memory:
    """The Engram tables of somebody else's model, spread over a mesh: look up, combine, update.

    A value: hashable, holding no arrays. The verbs run inside `jax.jit` (under `lax.scan` and
    `jax.checkpoint`, too) or outside, on global arrays, on meshes with Auto or Explicit axes, and
    never inside a `jax.shard_map`. Whatever the mesh, the same tokens read the same bits.

    Attributes:
      config: rows, heads, layers and dtype of the tables; `config.pad_id` is a raw token id.
      vocabulary: canonical ids of the tokenizer; None hashes raw ids below `config.vocab_size`.
      mesh: over which the tables lie; None is one device.
      axes: the mesh's axes over which the tables' shards and the batch are spread; over all other
        axes both are repeated.
      optimizer: the tables' optimizer, as `tables.row_optimizers` makes them.
      capacity: rows that a device asks of each peer in one round, over the even share of the ids
        that it looks up. Exactness does not depend on it: where it is short, more rounds follow.
      dtype: "float32" or "bfloat16", of the rows that look-ups give.

    Raises:
      UserError: the mesh has no such axes, or they do not divide the tables' shards; a pad id that
        the vocabulary does not have; `config.keys` is a control.
    """

    config: EngramConfig
    vocabulary: CompressedVocabulary | None = None
    mesh: Mesh | None = None
    axes: tuple[str, ...] = ("data",)
    optimizer: RowOptimizer = row_rmsprop()  # noqa: RUF009  (a value, though a call makes it)
    capacity: float = ROOM
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(isinstance(self.axes, tuple) and len(set(self.axes)) == len(self.axes) > 0,
                "Memory.axes", self.axes, 'must be a tuple of axes of the mesh, as ("data",)')
        names = self.axes if self.mesh is None else self.mesh.axis_names
        require(set(self.axes) <= set(names), "Memory.axes", self.axes,
                f"must be axes of the mesh, which has {tuple(names)}")
        require(isinstance(self.optimizer, RowOptimizer), "Memory.optimizer", self.optimizer,
                "must be made by one of tables.row_optimizers, as row_adam()")
        require(0 < self.capacity < math.inf, "Memory.capacity", self.capacity, "must be positive")
        require(self.dtype in ("float32", "bfloat16"), "Memory.dtype", self.dtype,
                "must be float32 or bfloat16")
        require(self.config.keys == "ngrams", "EngramConfig.keys", self.config.keys,
                "is a control of this library's own training; a memory has ngrams")
        assert self._addressing.sites == self.sites  # made here, it refuses a bad pad id at once
        for site in self.sites:
            layout_of(site).check_divides(self.devices, "EngramConfig.shards")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The tables of the memory, one for each layer, or one for all (`config.one_table`)."""
        return sites(self.config)

    @property
    def devices(self) -> int:
        """P, how many devices share the tables."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.axes)

    # --- The tables ---

    def init(self, key: jax.Array) -> Tables:
        """New tables and moments, born where they lie.

        Args:
          key: a key of jax.random; the tables do not depend on the mesh.
        """
        return jax.jit(self._init, out_shardings=self.shardings())(key)

    def abstract(self) -> Tables:
        """Shapes, dtypes and shardings of the tables: what a checkpoint is restored into.

        Orbax refuses one of another dtype, hash, vocabulary or optimizer: its structure is another.
        """
        shapes, shardings = self._shapes, self.shardings()
        if shardings is None:
            return shapes
        return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)

    def shardings(self) -> Tables | None:
        """The NamedSharding of every leaf of the tables; None without a mesh."""
        mesh = self.mesh
        if mesh is None:
            return None
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self._specs(),
                            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    # --- The verbs ---

    def lookup(
        self,
        tables: Tables,
        tokens: jax.Array,
        *,
        history: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> Lookup:
        """The rows behind the n-grams that end at each token, and the way back.

        Args:
          tables: this memory's tables.
          tokens: raw token ids, whole numbers [B, T]; the devices divide B.
          history: raw ids before these, oldest first, [B, at least N - 1]; None is the start of a
            sequence.
          positions: position of each token in its document, whole numbers [B, T]; n-grams then
            stop at the document's start. None lets them cross it.

        Raises:
          UserError: shapes or dtypes that do not go together; tables of another memory; tokens in
            a NumPy array that the vocabulary does not have (in a jax array they are counted in
            `Lookup.outside`, and n-grams with one of them read zeros).
        """
        refuse_shard_map()
        check_tables(tables, self._shapes)
        tokens = self._whole_numbers("tokens", tokens)
        batch = tokens.shape[:1]
        require(batch[0] % self.devices == 0, "tokens.shape", tokens.shape,
                f"has {batch[0]} sequences, which do not divide among {self.devices} devices")
        if history is not None:
            history, before = self._whole_numbers("history", history), self.config.max_order - 1
            require(history.shape[:1] == batch and history.shape[1] >= before, "history.shape",
                    history.shape, f"must be ({batch[0]}, {before} or more)")
        if positions is not None:
            positions = self._whole_numbers("positions", positions, ids=False)
            require(positions.shape == tokens.shape, "positions.shape", positions.shape,
                    f"must be {tokens.shape}, that of tokens")
        return _lookup(self, tables.values, tokens, history, positions)

    def combine(
        self, lookup: Lookup | Sequence[Lookup], row_grads: Mapping[int, Any] | Sequence[Any]
    ) -> Combined:
        """The gradients of the rows that were looked up, summed where the rows are owned.

        For a batch in parts (gradient accumulation) give the look-ups and the gradients of all
        parts, as two lists or as `jax.lax.scan` stacks them, [A, B, T, H, C]. They add up, so let
        each part's loss be its share of the whole mean. Gradients of other tokens, in a batch of
        equal shape, cannot be told from right ones: they would move the rows of this look-up.

        Args:
          lookup: what `lookup` gave.
          row_grads: for each layer the gradient of the loss with respect to `lookup.rows`.

        Raises:
          UserError: gradients that have not the layers or shapes of the look-up's rows; a look-up
            on another mesh.
        """
        refuse_shard_map()
        whole, grads = in_one(lookup, row_grads)
        check_devices("lookup", whole.counts["rounds"], self.devices)
        by_table: dict[str, Any] = {}
        for layer, grad in grads.items():
            name = engram_site(self.config, layer)
            by_table[name] = by_table[name] + grad if name in by_table else grad
        return _combine(self, whole.ids, whole.routes, by_table)

    def update(
        self,
        tables: Tables,
        combined: Combined,
        learning_rate: jax.Array | float,
        scale: jax.Array | float = 1.0,
    ) -> Tables:
        """The tables and moments after one update of the rows that have a gradient.

        A step is skipped, and no bit changes, where `scale` is 0 or anything is not finite: scale,
        learning rate or a gradient of a row. Give the scale NaN or 0 to skip for reasons of your
        own. The number that bias corrections need is `tables.updates`: nobody has to count.

        Args:
          tables: before; donate them to the jitted step, and they are changed in place.
          combined: what `combine` gave.
          learning_rate: a scalar, the rate of the rows.
          scale: a scalar on the gradients, as clipping makes it.

        Raises:
          UserError: tables of another memory, gradients that were not combined or on another mesh,
            a rate or a scale that is not one number.
        """
        refuse_shard_map()
        check_tables(tables, self._shapes)
        require(isinstance(combined, Combined), "combined", type(combined).__name__,
                "must be what Memory.combine gave")
        check_devices("combined", combined.squares, self.devices)
        require(set(combined.gradients) == set(tables.values), "combined", set(combined.gradients),
                f"must be of the tables {sorted(tables.values)}")
        rate, factor = as_scalar("learning_rate", learning_rate), as_scalar("scale", scale)
        good = jnp.isfinite(combined.square * factor * rate) & (factor != 0)
        return _update(self, tables, combined.gradients, rate, factor, good)

    # --- What one device does ---

    def _local(self, tokens: int) -> LocalMemory:
        """The memory as a device sees it that looks up so many tokens."""
        axes = () if self.mesh is None else self.axes
        return LocalMemory.sized(self.sites, self.optimizer, tokens, axes=axes,
                                 devices=self.devices, near=self._near, share=self.capacity)

    def _local_ids(self, tokens_BT: Any, history_BP: Any, positions_BT: Any) -> tuple[Any, Any]:
        """Row ids for each table, -1 for n-grams with a token that there is not, and how many
        tokens those are."""
        raw = self._vocabulary.lookup.size
        with jax.named_scope("hash"):
            ids = self._addressing.ids(tokens_BT, positions_BT, history_BP)
            outside = sum(jnp.sum((each < 0) | (each >= raw), dtype=jnp.int32)
                          for each in (tokens_BT, history_BP) if each is not None)
            return ids, outside

    @functools.cached_property
    def _addressing(self) -> Addressing:
        return address(self.config, self._vocabulary)

    @functools.cached_property
    def _vocabulary(self) -> CompressedVocabulary:
        return self.vocabulary or CompressedVocabulary.identity(self.config.vocab_size)

    @functools.cached_property
    def _near(self) -> int:
        """How many of the devices lie together (`collectives.neighbours`)."""
        if self.mesh is None or self.mesh.size != self.devices:
            return 0
        order = [self.mesh.axis_names.index(axis) for axis in self.axes]
        order += [axis for axis in range(self.mesh.devices.ndim) if axis not in order]
        return collectives.neighbours(list(self.mesh.devices.transpose(order).flat))

    def _init(self, key: jax.Array) -> Tables:
        return Tables(
            values={site.name: layout_of(site).init(
                jax.random.fold_in(key, site.layer), self.config.table_std,
                self.config.table_dtype) for site in self.sites},
            moments={site.name: self.optimizer.init(layout_of(site)) for site in self.sites},
            updates=jnp.zeros((), jnp.int32),
            made_for={name: jnp.int32(site.rows)
                      for name, site in zip(self._made_for, self.sites, strict=True)})

    @functools.cached_property
    def _made_for(self) -> tuple[str, ...]:
        """For each site, in words that a checkpoint may have as a name, what its rows mean."""
        prints = self._addressing.fingerprints()
        return tuple("-".join((site.name, self.config.table_dtype, hashlib.sha256(
            prints[site.name].encode()).hexdigest()[:16])) for site in self.sites)

    @functools.cached_property
    def _shapes(self) -> Tables:
        """Shapes and dtypes of the tables, wherever they lie."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def _specs(self) -> Tables:
        """The PartitionSpec of every leaf of the tables."""
        return jax.tree.map(
            lambda leaf: PartitionSpec(self.axes) if leaf.ndim else PartitionSpec(), self._shapes)

    def _whole_numbers(self, name: str, given: Any, ids: bool = True) -> Any:
        """Whole numbers [B, T]; token ids that this memory can read, as far as can be seen."""
        array = given if isinstance(given, jax.Array) else np.asarray(given)
        require(array.ndim == 2, f"{name}.shape", array.shape, "must be [B, T]")
        require(bool(jnp.issubdtype(array.dtype, jnp.integer)), f"{name}.dtype", str(array.dtype),
                "must be a whole-number type")
        if ids and isinstance(array, np.ndarray):
            self._vocabulary.canonical(array)
        return array


# --- The verbs on global arrays, compiled once where they are called outside of a jit ---


def _stacked(tree: Any) -> Any:
    """What a device holds, with an axis in front along which devices are put together."""
    return jax.tree.map(lambda x: x[None], tree)


def _own(tree: Any) -> Any:
    """The inverse of `_stacked`."""
    return jax.tree.map(lambda x: x.reshape(x.shape[1:]), tree)


@functools.partial(jax.jit, static_argnums=0)
def _lookup(memory: Memory, values: Any, tokens: Any, history: Any, positions: Any) -> Lookup:
    def on_device(values: Any, tokens_BT: Any, history_BP: Any, positions_BT: Any) -> Any:
        ids, outside = memory._local_ids(tokens_BT, history_BP, positions_BT)
        local = memory._local(tokens_BT.size).lookup(values, ids)
        fetched = local.fetched.values()
        counts = {
            "outside": outside,
            "unique": sum(each.unique for each in fetched),
            "overflow": sum(each.overflow for each in fetched),
            "rounds": functools.reduce(jnp.maximum, [each.rounds for each in fetched]),
        }
        rows = {name: each.astype(memory.dtype) for name, each in local.rows.items()}
        return rows, ids, _stacked(local.routes), _stacked(counts)

    spread = PartitionSpec(memory.axes)
    verb = collectives.on_mesh(
        memory.mesh, on_device, spread, spread, spread, spread, out=spread)
    rows, ids, routes, counts = verb(values, tokens, history, positions)
    by_layer = {layer: rows[engram_site(memory.config, layer)] for layer in memory.config.layers}
    return Lookup(rows=by_layer, ids=ids, routes=routes, counts=counts)


@functools.partial(jax.jit, static_argnums=0)
def _combine(memory: Memory, ids: Any, routes: Any, row_grads: Any) -> Combined:
    several = next(iter(ids.values())).ndim == 4

    def on_device(ids: Any, routes: Any, row_grads: Any) -> Any:
        tokens = math.prod(next(iter(ids.values())).shape[:-1])
        local = memory._local(tokens)
        if several:
            routes = {name: local.exchanges[name].route(each) for name, each in ids.items()}
        else:
            routes = _own(routes)
        gradients = local.combine(routes, row_grads)
        return (_stacked(gradients),
                jnp.asarray(sum(each.square for each in gradients.values()))[None],
                jnp.asarray(sum(each.touched for each in gradients.values()))[None])

    spread = PartitionSpec(memory.axes)
    batch = PartitionSpec(None, memory.axes) if several else spread
    verb = collectives.on_mesh(memory.mesh, on_device, batch, batch, batch, out=spread)
    return Combined(*verb(ids, routes, row_grads))


@functools.partial(jax.jit, static_argnums=0)
def _update(
    memory: Memory, tables: Tables, gradients: Any, rate: Any, scale: Any, good: Any
) -> Tables:
    def on_device(tables: Tables, gradients: Any, rate: Any, scale: Any, good: Any) -> Tables:
        gradients = _own(gradients)
        rows = next(iter(gradients.values())).route.order_N.size
        local = memory._local(rows // memory.config.total_heads)
        values, moments = local.update(
            tables.values, tables.moments, gradients, tables.updates + 1, rate, scale, good)
        return Tables(values, moments, tables.updates + good.astype(jnp.int32), tables.made_for)

    specs, everywhere = memory._specs(), PartitionSpec()
    verb = collectives.on_mesh(
        memory.mesh, on_device, specs, PartitionSpec(memory.axes), everywhere, everywhere,
        everywhere, out=specs)
    return verb(tables, gradients, rate, scale, good)
