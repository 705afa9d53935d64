"""One step: hash, look up, forward, backward with respect to rows, update.

The whole step is one `jax.shard_map`: what is written here is what one device does with its
sequences, its part of the parameters and its part of the tables. On one device it is the same
program without collectives.

Shapes: B batch, T time, H rows of a token, C columns of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from engram_jax.config import RunConfig
from engram_jax.hashing.addressing import Addressing
from engram_jax.model import documents, moe, transformer
from engram_jax.model.layers import Whole, as_they_are
from engram_jax.model.loss import token_losses
from engram_jax.model.transformer import Observed
from engram_jax.tables import exchange, rounding
from engram_jax.tables.exchange import Exchange, Found, Returned, Route, UniqueRows
from engram_jax.training import placement
from engram_jax.training.fsdp import AXES
from engram_jax.training.optimizers import optimizer, schedule
from engram_jax.training.state import TrainState, row_optimizer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def train_step(
    run: RunConfig, addressing: Addressing, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure step of a run, (state, batch) -> (state, metrics); jit it with the state donated.

    A batch has tokens_BT, targets_BT int32 and starts_BT bool. Metrics are float32 scalars. A step
    whose gradient is not finite changes nothing but the step's number.

    Args:
      run: the run.
      addressing: tokens to row ids.
      mesh: where the state lies (`mesh.shardings`); None is this process's first device.

    Raises:
      UserError: the mesh does not divide the batch or a table.
    """
    mesh = mesh or placement.single_mesh()
    placement.check(run, mesh)
    split, tables = placement.param_split(run, mesh), placement.exchanges(run, mesh)
    transform = optimizer(run.optimizer, split.by_matrix)
    rate = schedule(run.optimizer, run.training.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        ids = row_ids(run, addressing, batch)
        asked = {name: tables[name].route(ids[name]) for name in ids}
        found = {name: tables[name].lookup(state.tables[name], ids[name], asked[name])
                 for name in ids}
        rows = {name: rounding.decode(each.rows) for name, each in found.items()}
        (loss, seen), (grads, row_grads) = gradients(
            run, state, rows, batch, split.whole, mesh.size)
        grads = split.summed(grads)
        returned = {name: tables[name].combine(asked[name], _flat(row_grads[name]))
                    for name in asked}
        square = split.square(grads) + _everywhere(sum(r.square for r in returned.values()))
        norm = jnp.sqrt(square)
        finite, scale = jnp.isfinite(norm), jnp.minimum(1.0, run.optimizer.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)

        step_number, learning_rate = state.step + 1, rate(state.step)
        updates = jax.tree.map(lambda u: u * learning_rate, updates)
        moved = _update_tables(run, tables, state, returned, scale, finite, learning_rate)
        seen = jax.lax.psum(seen, AXES)
        new = TrainState(
            step=step_number,
            params=_if(finite, optax.apply_updates(state.params, updates), state.params),
            router_bias=_if(
                finite, _rebalanced(run, state.router_bias, seen.loads), state.router_bias),
            opt_state=_if(finite, opt_state, state.opt_state),
            tables={name: table for name, (table, _) in moved.items()},
            table_state={name: table_state for name, (_, table_state) in moved.items()},
        )
        metrics = {
            "learning/loss": _everywhere(loss),
            "learning/grad_norm": norm,
            "learning/current_learning_rate": learning_rate,
            "learning/skipped": 1.0 - finite.astype(jnp.float32),
            **_seen_metrics(seen),
            **_exchange_metrics(asked, found, returned),
        }
        return new, metrics

    specs = placement.state_specs(run, mesh)
    return jax.shard_map(step, mesh=mesh, in_specs=(specs, PartitionSpec(AXES)),
                         out_specs=(specs, PartitionSpec()), check_vma=False)


def row_ids(run: RunConfig, addressing: Addressing, batch: Batch) -> dict[str, jax.Array]:
    """For each site, the row ids int32 [B, T, H] that the batch asks for."""
    position_BT = None
    if run.model.isolate_documents:
        position_BT = documents.documents(batch["starts_BT"]).position_BT
    return addressing.ids(batch["tokens_BT"], position_BT)


class Seen(NamedTuple):
    """What is kept of `Observed`, to be summed over microbatches and devices.

    Attributes:
      loads: as they are.
      gate: this part's share of the mean of all gates; None without Engram.
    """

    loads: list[jax.Array | None]
    gate: jax.Array | None


def gradients(
    run: RunConfig,
    state: TrainState,
    rows: dict[str, jax.Array],
    batch: Batch,
    whole: Whole,
    devices: int,
) -> tuple[tuple[jax.Array, Seen], tuple[Any, dict[str, jax.Array]]]:
    """This device's part of the loss and of the gradients of parameters and rows.

    The parts of all devices add up to the mean over the whole batch. With `training.accumulate`
    the sequences go through the network in so many parts, one after another.
    """
    parts = run.training.accumulate

    def loss_of(params: Any, rows: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, Seen]:
        loss, seen = mean_loss(params, rows, state.router_bias, batch, run, whole)
        gates = [jnp.mean(gate) for gate in seen.gates.values()]
        gate = jnp.mean(jnp.stack(gates)) / (devices * parts) if gates else None
        return loss / (devices * parts), Seen(seen.loads, gate)

    grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    if parts == 1:
        return grad(state.params, rows, batch)

    def one(part: tuple[dict[str, jax.Array], Batch]) -> tuple[Any, dict[str, jax.Array]]:
        out, (grads, row_grads) = grad(state.params, *part)
        return (out, grads), row_grads

    def add(total: Any, part: tuple[dict[str, jax.Array], Batch]) -> tuple[Any, Any]:
        sums, row_grads = one(part)
        return jax.tree.map(jnp.add, total, sums), row_grads

    cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (rows, batch))
    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], cut))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (out, grads), row_grads = jax.lax.scan(add, start, cut)
    return out, (grads, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), row_grads))


def losses(
    params: Any,
    rows: dict[str, jax.Array],
    router_bias: Any,
    batch: Batch,
    run: RunConfig,
    whole: Whole = as_they_are,
) -> tuple[jax.Array, Observed]:
    """Cross-entropy of every target in nats, float32 [B, T], and what could be observed."""
    x_BTMD, seen = transformer.body(params, batch["tokens_BT"], rows, router_bias, run.model,
                                    batch["starts_BT"], whole)
    head = transformer.head_params(params, run.model, whole)
    return token_losses(head, x_BTMD, batch["targets_BT"], run.model), seen


def mean_loss(
    params: Any,
    rows: dict[str, jax.Array],
    router_bias: Any,
    batch: Batch,
    run: RunConfig,
    whole: Whole = as_they_are,
) -> tuple[jax.Array, Observed]:
    """The mean of `losses`."""
    loss_BT, seen = losses(params, rows, router_bias, batch, run, whole)
    return jnp.mean(loss_BT), seen


def evaluation_step(
    run: RunConfig, addressing: Addressing, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]:
    """(state, batch) -> the weighted sum of the losses and the sum of the weights.

    The batch also has weights_BT, float32.
    """
    mesh = mesh or placement.single_mesh()
    placement.check(run, mesh)
    split, tables = placement.param_split(run, mesh), placement.exchanges(run, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        found = {name: tables[name].lookup(state.tables[name], ids, tables[name].route(ids))
                 for name, ids in row_ids(run, addressing, batch).items()}
        rows = {name: rounding.decode(each.rows) for name, each in found.items()}
        loss_BT, _ = losses(state.params, rows, state.router_bias, batch, run, split.whole)
        return (_everywhere(jnp.sum(loss_BT * batch["weights_BT"])),
                _everywhere(jnp.sum(batch["weights_BT"])))

    specs = placement.state_specs(run, mesh)
    return jax.shard_map(step, mesh=mesh, in_specs=(specs, PartitionSpec(AXES)),
                         out_specs=PartitionSpec(), check_vma=False)


def _update_tables(
    run: RunConfig,
    tables: dict[str, Exchange],
    state: TrainState,
    returned: dict[str, Returned],
    scale: jax.Array,
    finite: jax.Array,
    learning_rate: jax.Array,
) -> dict[str, tuple[jax.Array, Any]]:
    """For each site this device's part of the table and of its optimizer's state, moved."""
    update = row_optimizer(run, AXES).update
    moved = {}
    for name, each in returned.items():
        def move(carry: Any, rows: UniqueRows, name: str = name) -> Any:
            return update(tables[name].part, *carry, _scaled(rows, scale, finite), state.step + 1,
                          learning_rate * run.optimizer.table_multiplier)

        moved[name] = tables[name].update(
            each, (state.tables[name], state.table_state[name]), move)
    return moved


def _everywhere(value: Any) -> jax.Array:
    """The sum over all devices."""
    return jax.lax.psum(jnp.asarray(value, jnp.float32), AXES)


def _flat(grads_BTHC: jax.Array) -> jax.Array:
    return grads_BTHC.reshape(-1, grads_BTHC.shape[-1])


def _scaled(rows: UniqueRows, scale: jax.Array, finite: jax.Array) -> UniqueRows:
    """Clipped gradients; where the step is bad, no row at all."""
    ids_U = jnp.where(finite, rows.ids_U, exchange.UNUSED)
    return rows._replace(ids_U=ids_U, grads_UD=rows.grads_UD * scale)


def _if(finite: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _rebalanced(run: RunConfig, router_bias: Any, loads: list[jax.Array | None]) -> Any:
    if run.model.moe is None:
        return router_bias
    rate = run.model.moe.balance_rate
    return [None if bias is None or load is None else moe.rebalanced(bias, load, rate)
            for bias, load in zip(router_bias, loads, strict=True)]


def _seen_metrics(seen: Seen) -> Metrics:
    metrics = {}
    loads = [load for load in seen.loads if load is not None]
    if loads:
        metrics["moe/max_load_over_mean"] = jnp.max(
            jnp.stack([jnp.max(load / jnp.mean(load, axis=-1, keepdims=True)) for load in loads]))
    if seen.gate is not None:
        metrics["engram/gate_mean"] = seen.gate
    return metrics


def _exchange_metrics(
    asked: dict[str, Route], found: dict[str, Found], returned: dict[str, Returned]
) -> Metrics:
    """Sums over all sites and devices; the rounds are those of the site that needed most."""
    if not found:
        return {}
    ids = sum(route.order_N.size for route in asked.values()) * _everywhere(1)
    unique = _everywhere(sum(each.unique for each in found.values()))
    return {
        "engram/rows_touched": _everywhere(sum(each.touched for each in returned.values())),
        "engram/unique_share": unique / ids,
        "engram/ids_out_of_range": _everywhere(sum(r.outside for r in asked.values())),
        "exchange/rows_asked": unique,
        "exchange/overflow_rows": _everywhere(sum(each.overflow for each in found.values())),
        "exchange/rounds": jnp.max(jnp.stack([each.rounds for each in found.values()])).astype(
            jnp.float32),
    }
