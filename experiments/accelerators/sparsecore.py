"""A table of engram-27b on a TPU's SparseCores and by the exchange, compiled for a slice.

    python -m experiments.accelerators.sparsecore v5p:2x2x1 [ROOM]

It wants `jax-tpu-embedding` 0.2.0 and libtpu beside jax 0.12, and no TPU; nothing runs. Look-up and
update (Adagrad, float32) of four sequences a device: by the library's `tpu_sparse_dense_matmul`,
whose ids lie sorted by owner in buffers of ROOM (1.25) times their mean, and by `Memory`, whose
look-up also hashes and sorts. Prints JSON: bytes of a device that arguments, results and
temporaries take, and what collectives send. What SparseCores keep for themselves is not in
`temporary_bytes`, and what their all-to-alls of rows send is in no instruction that we count.
"""

import dataclasses
import functools
import math
import os
import sys
import time
from typing import Any

SEQUENCES, LENGTH, CORES = 4, 4096, 4  # of a device; SparseCores of a v5p


def main(topology: str, room: str = "1.25") -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from engram_jax.costs.slices import slice_of
    from engram_jax.settings import json_text

    mesh = Mesh(np.array(slice_of(topology).devices), ("data",), axis_types=(AxisType.Auto,))
    found: dict[str, Any] = {"topology": topology, "jax": jax.__version__}
    for name, programs in (("sparsecore", sparsecore(mesh, float(room))), ("exchange", ours(mesh))):
        for part, lower in programs.items():
            found[f"{name} {part}"] = told(lower)
    print(json_text(found, indent=1))


def told(lower: Any) -> dict[str, Any]:
    """What a program takes, or why it does not compile."""
    import jax

    from engram_jax.costs.collectives import by_kind, collectives

    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return {"error": str(error).strip().partition("\n")[0]}
    memory, calls = compiled.memory_analysis(), collectives(compiled)
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives_first_round": by_kind(call for call in calls if call.exact),
        "compile_s": round(time.perf_counter() - start, 1)}


def table() -> Any:
    """One layer's memory of engram-27b, in float32."""
    from engram_jax import recipes

    engram = recipes.engram_27b().model.engram
    assert engram is not None
    return dataclasses.replace(engram, layers=(1,), table_dtype="float32")


def ours(mesh: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from engram_jax import Memory
    from engram_jax.tables.row_optimizers import row_adagrad

    memory = Memory(table(), mesh=mesh, axes=("data",), optimizer=row_adagrad())
    tables, spread = memory.abstract(), NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((SEQUENCES * mesh.size, LENGTH), jnp.int32, sharding=spread)
    lookup = jax.eval_shape(memory.lookup, tables, tokens)
    placed = functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=spread))
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)

    def update(tables: Any, lookup: Any, grads: Any, rate: jax.Array) -> Any:
        return memory.update(tables, memory.combine(lookup, grads), rate)

    return {
        "look-up": lambda: jax.jit(memory.lookup).lower(tables, tokens),
        "update": lambda: jax.jit(
            update, donate_argnums=0, out_shardings=memory.shardings()).lower(
                tables, placed(lookup), placed(lookup.rows), rate)}


def sparsecore(mesh: Any, room: float) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from jax_tpu_embedding.sparsecore.lib.nn import embedding, embedding_spec
    from jax_tpu_embedding.sparsecore.utils import utils

    from engram_jax.hashing.addressing import sites

    engram, devices = table(), mesh.size
    (site,) = sites(engram)
    ids = SEQUENCES * LENGTH * site.hash_config.total_heads  # of a device, each a sample of its own
    most = math.ceil(ids / (CORES * CORES * devices) * room / 8) * 8  # from a core to another
    spec = embedding_spec.TableSpec(
        name="engram", vocabulary_size=site.rows, embedding_dim=site.dim, combiner="sum",
        initializer=jax.nn.initializers.zeros,
        optimizer=embedding_spec.AdagradOptimizerSpec(learning_rate=0.01),
        max_ids_per_partition=most, max_unique_ids_per_partition=most)
    features = {"rows": embedding_spec.FeatureSpec(
        name="rows", table_spec=spec, input_shape=(ids * devices, 1),
        output_shape=(ids * devices, site.dim))}
    embedding.prepare_feature_specs_for_training(features, devices, CORES)
    stacked = features["rows"].table_spec.stacked_table_spec
    spread = NamedSharding(mesh, PartitionSpec("data"))
    given = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread),
        embedding.eval_preprocess_sparse_dense_matmul_input_shape(
            features, devices, devices, num_sc_per_device=CORES))
    lies = utils.embedding_table_format(mesh, PartitionSpec("data", None))
    one = jax.ShapeDtypeStruct(
        (stacked.stack_vocab_size, stacked.stack_embedding_dim), jnp.float32, sharding=lies)
    variables = {stacked.stack_name: embedding.EmbeddingVariables(one, (one,))}
    grads = {"rows": jax.ShapeDtypeStruct((ids * devices, site.dim), jnp.float32, sharding=spread)}
    common = {"feature_specs": features, "global_device_count": devices,
              "num_sc_per_device": CORES, "sharding_strategy": "MOD"}

    def mapped(function: Any, arguments: int) -> Any:
        return jax.shard_map(functools.partial(function, **common), mesh=mesh,
                             in_specs=(PartitionSpec("data"),) * arguments,
                             out_specs=PartitionSpec("data"), check_vma=False)

    update = functools.partial(embedding.tpu_sparse_dense_matmul_grad, step=1)
    return {
        "look-up": lambda: jax.jit(mapped(embedding.tpu_sparse_dense_matmul, 2)).lower(
            given, variables),
        "update": lambda: jax.jit(
            mapped(update, 3), donate_argnums=2,
            out_shardings={stacked.stack_name: embedding.EmbeddingVariables(lies, (lies,))}).lower(
                grads, given, variables)}


if __name__ == "__main__":
    main(*sys.argv[1:])
