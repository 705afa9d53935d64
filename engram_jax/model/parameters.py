"""How a parameter is declared: once, where its module makes it.

The function that makes a module's parameters gives a tree of `Parameter`, an array with all that
the rest of the library has to know of it: how it is trained, whether it is split over devices, in
which dtype it is served, what it counts as. Nothing else knows a parameter by its name, so adding
one is a line in that function and its use.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

PARTS = (  # what parameters count as, in the order of the network
    "over-encoding projections", "engram fusion", "attention", "routed experts", "shared experts",
    "routers", "dense FFN", "hyper-connections", "norms", "LM head", "token embedding")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: an array, or its shape, and what is declared of it.

    Attributes:
      value: float32; leading axes of a matrix (blocks, experts, branches) count independent
        matrices [in, out].
      trained: "matrix" (Muon), "embedding" (AdamW) or "vector" (Adam without decay).
      split: a mesh may split it along one of its last two axes.
      cast: it is used in the dtype of the activations, so inference keeps it in that.
      part: which of `PARTS` it counts as.
      owned: it is [..., experts, in, out], and devices of a mesh may each use some of the experts.
    """

    value: Any
    trained: str = dataclasses.field(metadata={"static": True})
    split: bool = dataclasses.field(metadata={"static": True})
    cast: bool = dataclasses.field(metadata={"static": True})
    part: str = dataclasses.field(default="", metadata={"static": True})
    owned: bool = dataclasses.field(default=False, metadata={"static": True})


Declared = dict[str, Any]  # a tree of `Parameter`


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
    """Float32 normal entries of standard deviation `std`."""
    return std * jax.random.normal(key, shape, jnp.float32)


def matrix(key: jax.Array, *shape: int) -> Parameter:
    """A weight [..., in, out] that starts with standard deviation in**-0.5."""
    return Parameter(normal(key, shape, shape[-2] ** -0.5), "matrix", split=True, cast=True)


def expert_matrix(key: jax.Array, *shape: int) -> Parameter:
    """A matrix of each expert, [experts, in, out]."""
    return dataclasses.replace(matrix(key, *shape), owned=True)


def router(key: jax.Array, *shape: int) -> Parameter:
    """A matrix that is small, and used in float32."""
    return Parameter(normal(key, shape, shape[-2] ** -0.5), "matrix", split=False, cast=False)


def embedding(key: jax.Array, shape: tuple[int, int], std: float) -> Parameter:
    """A matrix with a row or a column for each token."""
    return Parameter(normal(key, shape, std), "embedding", split=True, cast=True)


def vector(value: jax.Array) -> Parameter:
    """A gain, bias or scale, used in float32."""
    return Parameter(value.astype(jnp.float32), "vector", split=False, cast=False)


def taps(shape: tuple[int, ...]) -> Parameter:
    """The weights of a depthwise convolution, which starts as nothing."""
    return Parameter(jnp.zeros(shape, jnp.float32), "vector", split=False, cast=True)


def counted_as(part: str, declared: Any) -> Any:
    """The tree with `part` for each parameter that does not say itself what it counts as."""
    assert part in PARTS
    return jax.tree.map(
        lambda leaf: leaf if leaf.part else dataclasses.replace(leaf, part=part), declared,
        is_leaf=is_parameter)


def is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, Parameter)


def each(function: Any, declared: Any, *trees: Any) -> Any:
    """The tree of what `function` makes of each parameter (and the leaves of trees like it)."""
    return jax.tree.map(function, declared, *trees, is_leaf=is_parameter)


def values(declared: Any) -> Any:
    """The arrays alone, as the network takes them."""
    return each(lambda leaf: leaf.value, declared)
