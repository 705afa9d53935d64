"""How many parts a step is cut into, and what is kept for its backward pass, where a run leaves
that to the memory of its devices (`training.accumulate` 0, `model.remat` "auto").

What a sequence leaves for the backward pass is known without compiling: it is what JAX would hand
to it. What a block takes while it runs is not; `WORK` and `WHOLE` are of programs that libtpu
0.0.50 compiled (`engram-jax plan`), and so a guess elsewhere. Only compiling says whether a step
fits; where this is wrong, name both settings.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engram_jax.config import KEPT, ModelConfig, RunConfig
from engram_jax.hashing.addressing import sites
from engram_jax.host_memory import total_bytes
from engram_jax.model import parameters, transformer
from engram_jax.model.layers import as_they_are
from engram_jax.model.loss import mean_token_loss
from engram_jax.model.parameters import Parameter
from engram_jax.settings import changed
from engram_jax.training import placement
from engram_jax.training.fsdp import EXPERT, FSDP, SEQUENCE

# Of what one block would leave if everything was kept, how much is there at once while it runs
# backward.
WORK = 0.3
# Bytes for each number of the largest block's whole matrices, as they travel, and of their
# gradients, as they are made and as they leave.
WHOLE = 10


def fitted(run: RunConfig, mesh: Mesh, memory_bytes: int | None = None) -> RunConfig:
    """The run with `training.accumulate` and `model.remat` as they fit the mesh's devices, if it
    leaves them open: the fewest parts, as matrices travel for each, and of these what keeps most.

    Where nothing fits it is the most parts and what keeps least.

    Args:
      run: the run.
      mesh: where it is trained.
      memory_bytes: of a device; None asks it.
    """
    training, model = run.training, run.model
    if training.accumulate and model.remat != "auto":
        return run
    have = device_bytes(mesh) if memory_bytes is None else memory_bytes
    sequences = run.data.batch_size // (mesh.size // mesh.shape[SEQUENCE])
    all_parts = [training.accumulate] if training.accumulate else [
        parts for parts in range(1, sequences + 1) if sequences % parts == 0]
    kinds = KEPT if model.remat == "auto" else (model.remat,)
    tries = (changed(run, {"training.accumulate": parts, "model.remat": remat})
             for parts in all_parts for remat in kinds)
    one = run
    for one in tries:
        if step_bytes(one, mesh) <= have:
            break
    return one


def device_bytes(mesh: Mesh) -> int:
    """Bytes of memory of a device of the mesh; CPU devices share the machine's or container's."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return total_bytes() // len(mesh.local_devices)


def step_bytes(run: RunConfig, mesh: Mesh) -> int:
    """Bytes that a step takes of a device, by the guess of this module."""
    state = placement.placed_state(run, mesh)
    stretches, parts = mesh.shape[SEQUENCE], run.training.accumulate
    sequences = run.data.batch_size * stretches // mesh.size
    model, length = placement.settled(run, mesh).model, run.data.sequence_length
    rows = sum(  # and their gradients
        length * site.hash_config.total_heads * site.dim
        * (jnp.dtype(site.hash_config.table_dtype).itemsize + 4) for site in sites(run.model))
    a_sequence = kept_bytes(model, length) + WORK * kept_bytes(
        changed(model, {"remat": "none"}), length) / model.depth
    return round(
        bytes_of_a_device(state)
        + bytes_of_a_device(state.params) * (1 if parts == 1 else 2)  # gradients, and their sums
        + WHOLE * _whole_numbers(run, mesh)
        + (sequences * rows + sequences // parts * a_sequence) / stretches)


def _whole_numbers(run: RunConfig, mesh: Mesh) -> int:
    """Numbers of the matrices that a device makes whole at a time, of the block that has most or
    of the head."""
    declared, sharing = transformer.declared(run.model), mesh.shape[EXPERT]
    if mesh.shape[FSDP] * sharing == 1:
        return 0

    def numbers(leaf: Parameter) -> int:
        size = math.prod(leaf.value.shape[1:])
        return size // sharing if leaf.owned else size

    blocks = (parameters.each(numbers, segment["blocks"]) for segment in declared["segments"])
    return max(run.model.vocab_size * run.model.width,
               *(sum(jax.tree.leaves(block)) for block in blocks))


def bytes_of_a_device(tree: Any) -> int:
    """What a device holds of arrays that are shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=16)
def kept_bytes(model: ModelConfig, length: int) -> int:
    """Bytes that each further sequence of `length` tokens leaves for the backward pass."""
    one, two = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
        jax.eval_shape(functools.partial(_left, model), *_arguments(model, count, length))))
        for count in (1, 2))
    return two - one


def _left(
    model: ModelConfig, params: Any, rows: dict[str, jax.Array], bias: Any, tokens_BT: jax.Array,
    starts_BT: jax.Array,
) -> Any:
    """What the forward pass hands to the backward pass."""
    def loss(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        x_BTMD, _ = transformer.body(params, tokens_BT, rows, bias, model, starts_BT)
        head = transformer.head_params(params, model, as_they_are)
        return mean_token_loss(head, x_BTMD, tokens_BT, model)

    return jax.vjp(loss, params, rows)[1]


def _arguments(model: ModelConfig, count: int, length: int) -> Iterator[Any]:
    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, length, *shape), dtype)

    yield parameters.values(transformer.declared(model))
    yield {site.name: array(site.hash_config.table_dtype, site.hash_config.total_heads, site.dim)
           for site in sites(model)}
    yield jax.eval_shape(lambda: transformer.init_router_bias(model))
    yield array(jnp.int32)
    yield array(jnp.bool_)
