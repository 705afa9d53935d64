"""Parameters split over the mesh axes `fsdp` and `expert`: whole where they are used, split
everywhere else.

A matrix lies split along one of its last two axes. A block's matrices are gathered (in the dtype
that they are used in) when the block begins, and their gradients are summed and split again (in
float32) when its backward pass ends, so that a device never holds more than a block's weights
whole. Vectors, and matrices that the axes do not divide, are whole on every device.

Where the axis `expert` has more than one device, its devices share the experts: each makes whole
what all of them hold of its own, and nothing else. How parameters lie does not depend on that.

Everything but `split` runs inside `jax.shard_map`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from engram_jax.model import parameters
from engram_jax.model.parameters import Parameter
from engram_jax.tables import collectives
from engram_jax.training.optimizers import on_matrices

DATA, FSDP, EXPERT, SEQUENCE = "data", "fsdp", "expert", "sequence"
OVER = (FSDP, EXPERT)  # over which parameters are split
AXES = (DATA, *OVER, SEQUENCE)
BATCH = PartitionSpec((DATA, *OVER), SEQUENCE)  # of what is [B, T, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """How a parameter tree is split over `devices` devices of the axes `OVER`.

    Attributes:
      axes: for each leaf the axis that is split, counted from the end (-2 or -1), or 0 for none;
        so it also holds for one block's slice of a leaf that is stacked over blocks.
      owned: for each leaf whether it is experts' matrices.
      devices: along the axes `OVER`.
      sharing: of these along the axis `expert`.
      dtype: in which matrices travel.
      near: how many of them lie together (`collectives.neighbours`).
      near_fsdp: how many of those of the axis `fsdp` alone, or 0 for one step.
    """

    axes: Any
    owned: Any
    devices: int
    sharing: int
    dtype: str
    near: int
    near_fsdp: int

    def whole(self, params: Any, *path: str | int) -> Any:
        """The subtree `params`, which stands at `path` of the tree, with its matrices whole; of
        experts' matrices this device's own, where experts are shared."""
        axes, owned = self.axes, self.owned
        for key in path:
            axes, owned = axes[key], owned[key]
        with jax.named_scope("gather_weights"):
            return jax.tree.map(self._whole, params, axes, owned)

    def _whole(self, leaf: jax.Array, axis: int, owned: bool) -> jax.Array:
        if owned:
            return (own_gathered(leaf, axis, self.dtype, self.sharing, self.near_fsdp) if axis
                    else _own_of(leaf, self.sharing))
        return gathered(leaf, axis, self.dtype, self.near) if axis else leaf

    @jax.named_scope("sum_gradients")
    def summed(self, grads: Any) -> Any:
        """Gradients summed over all devices that hold the same part."""
        return jax.tree.map(
            lambda grad, axis: jax.lax.psum(grad, (DATA, SEQUENCE) if axis else AXES),
            grads, self.axes)

    def square(self, grads: Any) -> jax.Array:
        """The sum of the squares of all entries of summed gradients, float32."""
        squares = jax.tree.map(lambda grad: jnp.sum(grad**2), grads)
        parts = list(zip(jax.tree.leaves(squares), jax.tree.leaves(self.axes), strict=True))
        split = sum((square for square, axis in parts if axis), jnp.float32(0))
        return jax.lax.psum(split, OVER) + sum(square for square, axis in parts if not axis)

    def by_matrix(self, change: Callable[[jax.Array], jax.Array], updates: Any) -> Any:
        """All of `updates` after `change`, a function of whole matrices [N, in, out]."""
        return jax.tree.map(
            lambda leaf, axis: leaf if _is_masked(leaf) else on_matrices(
                self._spread(change, axis) if axis else change, leaf),
            updates, self.axes, is_leaf=_is_masked)

    def _spread(
        self, change: Callable[[jax.Array], jax.Array], axis: int
    ) -> Callable[[jax.Array], jax.Array]:
        """`change` for split matrices, each whole on one device.

        One all_to_all gives each device its share of the matrices, another splits them again.
        """

        def spread(matrices: jax.Array) -> jax.Array:
            count = matrices.shape[0]
            padded = jnp.pad(matrices, ((0, -count % self.devices), (0, 0), (0, 0)))
            shares = padded.reshape(self.devices, -1, *padded.shape[1:])
            whole = _joined(collectives.all_to_all(_packed(shares), OVER, self.near), axis,
                            shares.shape[1:])
            parts = _cut(change(whole), axis, self.devices)
            return collectives.all_to_all(parts, OVER, self.near).reshape(padded.shape)[:count]

        return spread

    def specs(self, params: Any) -> Any:
        """The PartitionSpec of each leaf."""
        return jax.tree.map(lambda leaf, axis: _spec(leaf.ndim, axis), params, self.axes)


def split(
    declared: Any, devices: int, dtype: str, near: int = 0, sharing: int = 1, near_fsdp: int = 0
) -> Split:
    """How to split a tree of `Parameter`: along the second-last axis, or else the last.

    The second-last first: a TPU keeps the last axis in lanes of 128, and a narrow one wastes them.
    """

    def axis(parameter: Parameter) -> int:
        if not parameter.split or devices == 1:
            return 0
        return next((a for a in (-2, -1) if parameter.value.shape[a] % devices == 0), 0)

    return Split(
        parameters.each(axis, declared), parameters.each(lambda leaf: leaf.owned, declared),
        devices, sharing, dtype, near, near_fsdp)


def _spec(ndim: int, axis: int) -> PartitionSpec:
    return PartitionSpec(*(OVER if axis and i == ndim + axis else None for i in range(ndim)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(part: jax.Array, axis: int, dtype: str, near: int) -> jax.Array:
    """The whole matrix in `dtype`; the gradient is summed over `OVER` in float32."""
    parts = collectives.all_gather(_packed(part.astype(dtype)), OVER, near)
    return _joined(parts, axis, part.shape)


def _gathered_backward(
    axis: int, dtype: str, near: int, _: None, grad: jax.Array
) -> tuple[jax.Array]:
    del dtype
    devices = jax.lax.axis_size(OVER)
    parts = _cut(grad.astype(jnp.float32), axis, devices)
    part = collectives.reduce_scatter(parts, OVER, near)
    shape = list(grad.shape)
    shape[axis] //= devices
    return (part.reshape(shape),)


gathered.defvjp(
    lambda part, axis, dtype, near: (gathered(part, axis, dtype, near), None), _gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def own_gathered(
    part: jax.Array, axis: int, dtype: str, sharing: int, near: int
) -> jax.Array:
    """Of experts' matrices [E, in, out] this device's own, whole, [X, in, out] float32.

    X is E / `sharing`, rounded up; experts that are not there are zeros. Of each expert its owner,
    or everybody where experts are not shared, gets what its neighbours along `expert` hold, and
    then all of it along `fsdp`. They travel in `dtype`, and the numbers are those of `dtype`: what
    multiplies them casts them back, and of two conversions the compiler makes none. So their
    gradient stays float32 as it was summed until it has gone the same way back and is summed along
    `fsdp`.
    """
    parts = _packed(_shared_out(part.astype(dtype), sharing))
    mine = _swapped(parts)  # from each neighbour, of my experts
    whole = collectives.all_gather(mine, FSDP, near)
    return _joined(whole.reshape(-1, *whole.shape[2:]), axis,
                   (parts.shape[1], *part.shape[1:])).astype(jnp.float32)


def _own_gathered_backward(
    axis: int, dtype: str, sharing: int, near: int, saved: tuple[int, ...], grad: jax.Array
) -> tuple[jax.Array]:
    del dtype
    shape = list(saved)
    devices = grad.shape[axis] // shape[axis]
    parts = _cut(grad.astype(jnp.float32), axis, devices)
    parts = parts.reshape(devices // sharing, sharing, *parts.shape[1:])
    mine = collectives.reduce_scatter(parts, FSDP, near)
    back = _swapped(mine)
    return (back.reshape(-1, *shape[1:])[: shape[0]],)


def _shared_out(matrices: jax.Array, sharing: int) -> jax.Array:
    """Matrices [E, in, out] by their owners, [sharing, X, in, out]."""
    padded = jnp.pad(matrices, ((0, -matrices.shape[0] % sharing), (0, 0), (0, 0)))
    return padded.reshape(sharing, -1, *padded.shape[1:])


def _swapped(parts: jax.Array) -> jax.Array:
    """What each neighbour along `expert` has for this device, in their order."""
    return parts if parts.shape[0] == 1 else jax.lax.all_to_all(parts, EXPERT, 0, 0)


def _own_of(matrices: jax.Array, sharing: int) -> jax.Array:
    """This device's own of matrices that all have."""
    if sharing == 1:
        return matrices
    return jax.lax.dynamic_index_in_dim(
        _shared_out(matrices, sharing), jax.lax.axis_index(EXPERT), keepdims=False)


own_gathered.defvjp(
    lambda part, axis, dtype, sharing, near: (
        own_gathered(part, axis, dtype, sharing, near), part.shape), _own_gathered_backward)


# Parts travel as `collectives.packed` says, so that a TPU's buffers have no gaps; and libtpu made
# all-reduces of reduce-scatters whose parts were [55, 10, 1536].


def _packed(parts: jax.Array) -> jax.Array:
    """Parts [..., in, out], packed."""
    return parts.reshape(*parts.shape[:-2], *collectives.packed(*parts.shape[-2:]))


def _joined(parts: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """Packed parts of `shape`, [P, ...], joined along `axis`, -2 or -1."""
    *lead, rows, columns = shape
    if axis == -2:
        return jnp.moveaxis(parts, 0, len(lead)).reshape(*lead, -1, columns)
    return jnp.moveaxis(parts.reshape(-1, *shape), 0, -2).reshape(*lead, rows, -1)


def _cut(whole: jax.Array, axis: int, devices: int) -> jax.Array:
    """The inverse of `_joined`: packed parts [P, ...]."""
    *lead, rows, columns = whole.shape
    if axis == -2:
        parts = whole.reshape(*lead, devices, *collectives.packed(rows // devices, columns))
        return jnp.moveaxis(parts, len(lead), 0)
    parts = whole.reshape(*lead, rows, devices, columns // devices)
    return _packed(jnp.moveaxis(parts, -2, 0))


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
