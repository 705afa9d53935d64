"""Collectives over many devices; on a TPU slice, in two steps along its axes.

A slice is a torus of chips. Where one group of devices is all of a slice, libtpu makes all-reduces
of all-gathers (three-dimensional slices) and of reduce-scatters (two-dimensional ones, too), which
take P times the memory and about twice the bytes (0.0.42 and 0.0.50), and took up to a minute to
compile a single all_to_all of 256 devices (0.0.42). First among those that lie together and then
among the groups of them, each stays what it is and compiles in a second. But a step uses the links
of its own axes alone. So those together lie on one axis, and what is large travels along all
others; and where a group is a part of a slice, one step will do.

All act on a leading axis of P devices: an all_to_all along an inner axis took the compiler over
five minutes. `near` is how many of the P, in their order, lie together (`neighbours`); 0 is one
step. Everything but `neighbours`, `in_blocks`, `extent` and `on_mesh` runs inside `jax.shard_map`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...]
_TILE = (8, 128)  # how a TPU keeps the last two axes of float32


def neighbours(devices: Sequence[jax.Device]) -> int:
    """How many of the first devices lie together: those along the slice's fastest axis.

    0 where they all lie on one axis of a slice, and where there is no slice.
    """
    strides = {next(i for i, coordinate in enumerate(along) if coordinate != along[0])
               for along in _spanned(devices)}
    return sorted(strides)[1] if len(strides) > 1 else 0


def in_blocks(devices: Sequence[jax.Device], size: int) -> list[jax.Device]:
    """The devices in such an order that each `size` of them are a block of a slice, as nearly a
    cube as its axes allow: what goes from all to all of a block takes less of its busiest link than
    along one axis. Within a block, and from block to block, the last axis comes first.

    They stay as they are where there is no slice, where they do not fill a box, and where no block
    of that size divides it.
    """
    along = _spanned(devices)
    places = [sorted(set(each)) for each in along]
    shapes = [shape for shape in itertools.product(*(range(1, len(each) + 1) for each in places))
              if math.prod(shape) == size
              and not any(len(each) % n for each, n in zip(places, shape, strict=True))]
    if not along or not shapes or math.prod(map(len, places)) != len(devices):
        return list(devices)
    block = min(shapes, key=lambda shape: (max(shape), *shape))

    def order(device: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        parts = [divmod(each.index(own[device]), n)
                 for each, own, n in zip(places, along, block, strict=True)]
        return tuple(first for first, _ in parts), tuple(second for _, second in parts)

    return [devices[each] for each in sorted(range(len(devices)), key=order)]


def extent(devices: Sequence[jax.Device]) -> tuple[int, ...]:
    """Along how many places of each axis of a slice they lie, axes that all have in common left
    out; () where there is no slice."""
    if devices[0].platform != "tpu":
        return ()
    return tuple(len(set(along)) for along in _spanned(devices)) or (1,)


def _spanned(devices: Sequence[jax.Device]) -> list[tuple[int, ...]]:
    """The devices' coordinates on each axis of a slice that not all have in common."""
    if devices[0].platform != "tpu":
        return []
    return [along for along in zip(*(device.coords for device in devices), strict=True)
            if len(set(along)) > 1]


def on_mesh(
    mesh: Mesh | None, function: Callable[..., Any], *specs: Any, out: Any
) -> Callable[..., Any]:
    """`function` of what one device holds, over global arrays that lie as `specs` say."""
    if mesh is None:
        return function
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    explicit = AxisType.Explicit in mesh.axis_types

    def spread(spec: PartitionSpec, args: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.sharding.reshard(leaf, NamedSharding(mesh, spec)), args)

    def run(*args: Any) -> Any:
        if explicit:
            args = tuple(jax.tree.map(spread, spec, arg, is_leaf=lambda x: isinstance(
                x, PartitionSpec)) for spec, arg in zip(specs, args, strict=True))
        return mapped(*args)

    return run


def all_gather(part: jax.Array, axes: Axes, near: int) -> jax.Array:
    """The parts of all devices, [P, ...]."""
    if not near:
        return jax.lax.all_gather(part, axes)
    together, apart = _groups(axes, near)
    parts = jax.lax.all_gather(part, axes, axis_index_groups=together)
    parts = jax.lax.all_gather(parts, axes, axis_index_groups=apart)
    return parts.reshape(-1, *part.shape)


def reduce_scatter(parts: jax.Array, axes: Axes, near: int) -> jax.Array:
    """This device's of the parts [P, ...], summed over all devices."""
    if not near:
        return jax.lax.psum_scatter(parts, axes)
    together, apart = _groups(axes, near)
    parts = parts.reshape(-1, near, *parts.shape[1:])
    parts = jax.lax.psum_scatter(parts, axes, axis_index_groups=apart)
    return jax.lax.psum_scatter(parts, axes, axis_index_groups=together)


def packed(rows: int, columns: int) -> tuple[int, ...]:
    """A shape in which a TPU keeps a part of a matrix without a gap, or else the part's own.

    Of a part of 10 rows it would keep 16, in every buffer that a collective reads or writes.
    """
    tiles, rest = divmod(rows * columns, _TILE[0] * _TILE[1])
    return (rows, columns) if rest else (tiles, *_TILE)


def all_to_all(parts: jax.Array, axes: Axes, near: int) -> jax.Array:
    """What each device holds for this one, [P, ...]; given is what this one holds for each."""
    if not near:
        return jax.lax.all_to_all(parts, axes, 0, 0)
    together, apart = _groups(axes, near)
    split = parts.reshape(-1, near, *parts.shape[1:])
    split = jax.lax.all_to_all(split, axes, 0, 0, axis_index_groups=apart)
    split = jnp.moveaxis(split, 1, 0)
    split = jax.lax.all_to_all(split, axes, 0, 0, axis_index_groups=together)
    return jnp.moveaxis(split, 1, 0).reshape(parts.shape)


def _groups(axes: Axes, near: int) -> tuple[list[list[int]], list[list[int]]]:
    """Devices by their numbers: groups of `near` that lie together, and groups of one of each."""
    devices = jax.lax.axis_size(axes)
    together = [list(range(start, start + near)) for start in range(0, devices, near)]
    return together, [list(group) for group in zip(*together, strict=True)]
