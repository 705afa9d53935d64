"""Parts of a model that a run leaves as they were (`training.freeze`)."""

from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config import RunConfig

MEMORIES = frozenset({"engram", "over_encoding"})  # keys of the parameters that read rows


def gradients_of_trained(run: RunConfig, grads: Any) -> Any:
    """The gradients of parameters, zero where they are frozen: they count in no norm."""
    if run.training.freeze != "backbone":
        return grads
    return jax.tree_util.tree_map_with_path(
        lambda path, g: g if _of_memory(path) else jnp.zeros_like(g), grads)


def only_trained(run: RunConfig, new: Any, old: Any) -> Any:
    """Parameters after a step, those that are frozen as they were: weight decay moves them, too."""
    if run.training.freeze != "backbone":
        return new
    return jax.tree_util.tree_map_with_path(
        lambda path, n, o: n if _of_memory(path) else o, new, old)


def _of_memory(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) in MEMORIES for key in path)
