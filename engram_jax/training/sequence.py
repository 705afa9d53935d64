"""Sequences split over the mesh axis `sequence`, inside `jax.shard_map`.

Every exchange here is linear, and its gradient goes back the way it came: what several stretches
read of one, adds up there.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engram_jax.model.sequence import Stretch, alone
from engram_jax.training.fsdp import SEQUENCE


@dataclasses.dataclass(frozen=True)
class MeshStretch:
    """The `model.sequence.Stretch` of a device; `count` are along the axis."""

    count: int

    def positions(self, time: int) -> jax.Array:
        first = jax.lax.axis_index(SEQUENCE) * time
        return (first + jnp.arange(time, dtype=jnp.int32))[None]

    def before(self, x_BT: jax.Array, reach: int) -> jax.Array:
        """From the neighbour alone, so a stretch must be as long as the reach."""
        time = x_BT.shape[1]
        assert reach <= time, (reach, time)
        onwards = [(number, number + 1) for number in range(self.count - 1)]
        return jax.lax.ppermute(x_BT[:, time - reach:], SEQUENCE, onwards)

    def everywhere(self, x_BT: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x_BT, SEQUENCE, axis=1, tiled=True)

    def own(self, x_BS: jax.Array) -> jax.Array:
        return self._part(x_BS, 1)

    def by_heads(self, x_BTH: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x_BTH, SEQUENCE, split_axis=2, concat_axis=1, tiled=True)

    def by_time(self, x_BSH: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x_BSH, SEQUENCE, split_axis=1, concat_axis=2, tiled=True)

    def own_heads(self, x_CH: jax.Array) -> jax.Array:
        return self._part(x_CH, 1)

    def _part(self, x: jax.Array, axis: int) -> jax.Array:
        size = x.shape[axis] // self.count
        first = jax.lax.axis_index(SEQUENCE) * size
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def stretch_of(mesh: Mesh) -> Stretch:
    """How the sequences of a mesh are split."""
    count = mesh.shape[SEQUENCE]
    return MeshStretch(count) if count > 1 else alone
