"""Everything that a step changes, as one pytree."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from engram_jax.config import RunConfig
from engram_jax.hashing.addressing import sites
from engram_jax.model import transformer
from engram_jax.tables import row_optimizers
from engram_jax.tables.layout import layout_of
from engram_jax.tables.row_optimizers import RowOptimizer
from engram_jax.training.optimizers import optimizer


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
      step: int32 scalar, steps taken.
      params: the model's parameters, float32.
      router_bias: the balancing biases, as `transformer.init_router_bias` makes them.
      opt_state: what the optimizer of `params` remembers.
      tables: for each memory site, its table [S, R, D].
      table_state: for each memory site, the row optimizer's state.
    """

    step: jax.Array
    params: Any
    router_bias: Any
    opt_state: Any
    tables: dict[str, jax.Array]
    table_state: dict[str, Any]


# Fields that a forward pass reads; the others are the optimizers'.
READ = ("step", "params", "router_bias", "tables")


def to_be_read(state: TrainState) -> TrainState:
    """The state, or a tree like it, without what only training needs."""
    return dataclasses.replace(state, opt_state={}, table_state={})


def row_optimizer(run: RunConfig) -> RowOptimizer:
    """The optimizer of the run's tables."""
    return row_optimizers.row_optimizer(run.optimizer)


def updates_made(opt_state: Any) -> jax.Array:
    """How many steps have changed the parameters, int32: all but the skipped ones."""
    return optax.tree.get(opt_state, "made")


def init_state(run: RunConfig, seed: jax.Array | None = None) -> TrainState:
    """The state before the first step; a pure function, to be jitted.

    `seed`, int32, replaces `training.seed`, so that one program serves all seeds.
    """
    key = jax.random.key(run.training.seed if seed is None else seed)
    params_key, tables_key = jax.random.split(key)
    params = transformer.init(run.model, params_key)
    rows = row_optimizer(run)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router_bias=transformer.init_router_bias(run.model),
        opt_state=optimizer(run.optimizer, transformer.declared(run.model)).init(params),
        tables={site.name: layout_of(site).init(
            jax.random.fold_in(tables_key, site.layer), site.hash_config.table_std,
            site.hash_config.table_dtype)
            for site in sites(run.model)},
        table_state={site.name: rows.init(layout_of(site)) for site in sites(run.model)},
    )


def abstract_state(run: RunConfig) -> TrainState:
    """Shapes and dtypes of the run's state."""
    return jax.eval_shape(lambda: init_state(run))
