"""Muon for matrices, Adam for the rest (docs/spec.md section 3.3).

Tables have optimizers of their own, `tables.row_optimizers`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from engram_jax.config import OptimizerConfig
from engram_jax.model import parameters

# (change, updates) -> updates with `change`, a function of matrices [N, in, out], applied to each.
ByMatrix = Callable[[Callable[[jax.Array], jax.Array], Any], Any]

def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step: a linear warm-up, then `config.schedule`.

    The warm-up ends where the decay begins, if it has not before, so that no rate is above the one
    before from there on.
    """
    shares = config.decay_at if config.schedule == "step" else (1 - config.decay_share,)
    # As the comparison in the program rounds it.
    begin = min((math.ceil(np.float32(share * steps)) for share in shares), default=steps)
    last = max(0, begin - 1)  # before the decay

    def rate(step: jax.Array) -> jax.Array:
        warm = jnp.minimum(1.0, (jnp.minimum(step, last) + 1) / max(1, config.warmup_steps))
        if config.schedule == "wsd":
            fallen = jnp.clip((step - last) / max(1, steps - 1 - last), 0.0, 1.0)
            return config.learning_rate * jnp.minimum(
                warm, 1.0 - (1.0 - config.decay_floor) * fallen)
        factor = warm
        for share, value in zip(config.decay_at, config.decay_to, strict=True):
            factor = jnp.where(step >= share * steps, jnp.minimum(value, warm), factor)
        return config.learning_rate * factor

    return rate


def optimizer(
    config: OptimizerConfig, declared: Any, by_matrix: ByMatrix | None = None
) -> optax.GradientTransformation:
    """The transform of every parameter outside the tables, at a learning rate of 1.

    The step multiplies the updates by the rate of its own number, which skipped steps count in.

    Matrices get Muon with updates of RMS `muon_rms` and decoupled weight decay, embedding and head
    AdamW, vectors Adam without decay. Leading axes of a matrix (blocks, experts, branches) are
    independent matrices.

    Args:
      config: the settings.
      declared: the tree of the parameters, each a `model.parameters.Parameter`.
      by_matrix: brings together the matrices of leaves that are split over devices; None if none
        is. The transform's state does not depend on it.
    """
    adam = {"b1": config.adam_b1, "b2": config.adam_b2, "eps": config.adam_eps}
    muon = optax.chain(
        nesterov(config.muon_momentum),
        orthogonal(config.muon_rms, by_matrix or _here),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-1.0))
    return optax.partition(
        {
            "matrix": muon,
            "embedding": optax.adamw(1.0, weight_decay=config.weight_decay, **adam),
            "vector": optax.adam(1.0, **adam),
        },
        parameters.each(lambda parameter: parameter.trained, declared),
    )


class Momentum(NamedTuple):
    """made int32, the updates so far; mu, the mean of the gradients."""

    made: jax.Array
    mu: Any


def nesterov(beta: float) -> optax.GradientTransformation:
    """The look-ahead mean of the gradients, without bias, as optax's Muon takes it."""

    def init(params: Any) -> Momentum:
        return Momentum(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(grads: Any, state: Momentum, params: Any = None) -> tuple[Any, Momentum]:
        del params
        mu = optax.tree.update_moment(grads, state.mu, beta, 1)
        count = optax.safe_increment(state.made)
        ahead = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(mu, beta, optax.safe_increment(count)),
            optax.tree.bias_correction(grads, beta, count))
        return ahead, Momentum(count, mu)

    return optax.GradientTransformation(init, update)


def orthogonal(rms: float, by_matrix: ByMatrix) -> optax.GradientTransformation:
    """Newton-Schulz of each matrix, scaled to entries of root mean square `rms`."""
    newton_schulz = optax.contrib.scale_by_muon(
        ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,  # so many: a loop, where one would be unrolled
        beta=0.0, nesterov=False,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2))

    def change(matrices_NIO: jax.Array) -> jax.Array:
        # No momentum is left in it, so its state is made for the occasion.
        made, _ = newton_schulz.update(matrices_NIO, newton_schulz.init(matrices_NIO))
        return jnp.sqrt(max(matrices_NIO.shape[1:])) * rms * made

    return optax.stateless(lambda updates, params: by_matrix(change, updates))


def on_matrices(change: Callable[[jax.Array], jax.Array], leaf: jax.Array) -> jax.Array:
    """`change`, a function of matrices [N, in, out], applied to a leaf [..., in, out]."""
    return change(leaf.reshape(-1, *leaf.shape[-2:])).reshape(leaf.shape)


def _here(change: Callable[[jax.Array], jax.Array], updates: Any) -> Any:
    """Every matrix is whole on this device."""
    return jax.tree.map(lambda leaf: on_matrices(change, leaf), updates)
