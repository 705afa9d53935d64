"""How many rows a device asks of each peer, measured on the run's own first batches."""

import itertools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from engram_jax.config import RunConfig
from engram_jax.hashing.addressing import Addressing
from engram_jax.settings import changed
from engram_jax.training import placement
from engram_jax.training.fsdp import AXES, BATCH
from engram_jax.training.sequence import stretch_of
from engram_jax.training.step import row_ids

BATCHES = 4
MARGIN = 1.1  # over the most that any device asked of any peer in those batches


def with_capacity(
    run: RunConfig, addressing: Addressing, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> RunConfig:
    """The run with `training.row_capacity` measured if it is 0, rounded up to a hundredth.

    Args:
      run: the run.
      addressing: tokens to row ids.
      batches: this process's rows of batches like those that it will train on; a few are read.
      mesh: the run's mesh. On one device there is nothing to measure.
    """
    if run.training.row_capacity or mesh.size == 1 or not addressing.hashes:
        return run
    tables = placement.local_memory(run, mesh).exchanges

    def local(batch: dict[str, jax.Array]) -> jax.Array:
        shares = [jnp.max(tables[name].demand(ids)) * (mesh.size / ids.size)
                  for name, ids in row_ids(
                      run, addressing, batch, stretch_of(mesh)).items()]
        return jax.lax.pmax(jnp.max(jnp.stack(shares)), AXES)

    probe = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=BATCH,
                                  out_specs=PartitionSpec(), check_vma=False))
    most = max(float(probe(placement.put(batch, mesh)))
               for batch in itertools.islice(batches, BATCHES))
    share = math.ceil(100 * MARGIN * most) / 100
    return changed(run, {"training.row_capacity": share})
