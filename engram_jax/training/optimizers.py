"""Muon for matrices, Adam for the rest (SPEC section 3); tables have `memory.row_optimizers`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.config import OptimizerConfig

# Leaves that are not matrices of a hidden layer, by the last key of their path.
EMBEDDINGS = frozenset({"embedding", "head"})
VECTORS = frozenset({"final_gain", "attention_gain", "ffn_gain", "latent_gain", "query_gain",
                     "key_gain", "conv_gain", "conv", "bias", "scale"})


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then the rate times `decay_to[i]` from the share `decay_at[i]` on."""

    def rate(step: jax.Array) -> jax.Array:
        factor = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
        for share, value in zip(config.decay_at, config.decay_to, strict=True):
            factor = jnp.where(step >= share * steps, value, factor)
        return config.learning_rate * factor

    return rate


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transform of every parameter outside the tables, at a learning rate of 1.

    The step multiplies the updates by the rate of its own number, which skipped steps count in.

    Matrices get Muon with updates of RMS `muon_rms` and decoupled weight decay, embedding and head
    AdamW, vectors Adam without decay. Leading axes of a matrix (blocks, experts, branches) are
    independent matrices.
    """
    adam = {"b1": config.adam_b1, "b2": config.adam_b2, "eps": config.adam_eps}
    return optax.partition(
        {
            "matrix": optax.contrib.muon(
                1.0, beta=config.muon_momentum, weight_decay=config.weight_decay,
                consistent_rms=config.muon_rms,
                muon_weight_dimension_numbers=lambda tree: jax.tree.map(_matrix_axes, tree)),
            "embedding": optax.adamw(1.0, weight_decay=config.weight_decay, **adam),
            "vector": optax.adam(1.0, **adam),
        },
        labels,
    )


def labels(params: Any) -> Any:
    """For each leaf of the tree: "matrix", "embedding" or "vector"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _label(path), params)


def _label(path: tuple[Any, ...]) -> str:
    name = path[-1].key
    if name in EMBEDDINGS:
        return "embedding"
    return "vector" if name in VECTORS else "matrix"


def _matrix_axes(leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)
