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
from engram_jax.hashing.token_hash import BEFORE
from engram_jax.model import documents, moe, transformer
from engram_jax.model.layers import Whole, as_they_are
from engram_jax.model.loss import mean_token_loss, token_losses
from engram_jax.model.moe import Routed, experts_here
from engram_jax.model.sequence import Stretch, alone
from engram_jax.model.transformer import Observed
from engram_jax.tables.exchange import RowGradients
from engram_jax.tables.local import LocalLookup
from engram_jax.training import placement
from engram_jax.training.fitting import fitted
from engram_jax.training.freezing import gradients_of_trained, only_trained
from engram_jax.training.fsdp import AXES, BATCH
from engram_jax.training.optimizers import optimizer, schedule
from engram_jax.training.sequence import stretch_of
from engram_jax.training.state import TrainState, to_be_read, updates_made

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
    settled = placement.settled(fitted(run, mesh), mesh)
    split, memory = placement.param_split(run, mesh), placement.local_memory(run, mesh)
    routed, stretch = placement.routed(run, mesh), stretch_of(mesh)
    transform = optimizer(run.optimizer, transformer.declared(run.model), split.by_matrix)
    rate = schedule(run.optimizer, run.training.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        lookup = memory.lookup(state.tables, row_ids(run, addressing, batch, stretch))
        (loss, seen), (grads, row_grads) = gradients(
            settled, state, lookup.rows, batch, split.whole, mesh.size, routed, stretch)
        grads = split.summed(gradients_of_trained(run, grads))
        combined = memory.combine(lookup.routes, row_grads)
        square = split.square(grads)
        if run.training.freeze != "tables":
            square += _everywhere(sum(r.square for r in combined.values()))
        norm = jnp.sqrt(square)
        finite, scale = jnp.isfinite(norm), jnp.minimum(1.0, run.optimizer.clip_norm / norm)
        checks = {}
        if run.training.check_exchange and lookup.routes:
            checks = _exchange_checks(memory.agrees(lookup.routes), combined)
            finite &= checks["exchange/disagreements"] == 0
        learning_rate = rate(state.step)
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda g: g * scale, grads)
            updates, opt_state = transform.update(grads, state.opt_state, state.params)
            updates = jax.tree.map(lambda u: u * learning_rate, updates)
            params = _if(finite, only_trained(
                run, optax.apply_updates(state.params, updates), state.params), state.params)
            opt_state = _if(finite, opt_state, state.opt_state)
        moved, moments = state.tables, state.table_state
        if run.training.freeze != "tables":
            moved, moments = memory.update(
                state.tables, state.table_state, combined, updates_made(state.opt_state) + 1,
                learning_rate * run.optimizer.table_multiplier, scale, finite)
        seen = jax.lax.psum(seen, AXES)
        new = TrainState(
            step=state.step + 1,
            params=params,
            router_bias=_if(
                finite, _rebalanced(run, state.router_bias, seen.loads), state.router_bias),
            opt_state=opt_state,
            tables=moved,
            table_state=moments,
        )
        metrics = {
            "learning/loss": _everywhere(loss),
            "learning/grad_norm": norm,
            "learning/current_learning_rate": learning_rate,
            "learning/skipped": 1.0 - finite.astype(jnp.float32),
            **_seen_metrics(seen),
            **_exchange_metrics(lookup, combined),
            **checks,
        }
        return new, metrics

    specs = placement.state_specs(run, mesh)
    return jax.shard_map(step, mesh=mesh, in_specs=(specs, BATCH),
                         out_specs=(specs, PartitionSpec()), check_vma=False)


def row_ids(
    run: RunConfig, addressing: Addressing, batch: Batch, stretch: Stretch = alone
) -> dict[str, jax.Array]:
    """For each site, the row ids int32 [B, T, H] that the batch, a stretch of its sequences, asks
    for."""
    position_BT = None
    if run.model.isolate_documents:
        whole = documents.documents(stretch.everywhere(batch["starts_BT"]))
        position_BT = stretch.own(whole.position_BT)
    with jax.named_scope("hash"):
        history_BP = stretch.before(batch["tokens_BT"] - BEFORE, addressing.history_length)
        if history_BP is not None:
            history_BP += BEFORE  # what comes before the first stretch has been 0
        return addressing.ids(batch["tokens_BT"], position_BT, history_BP)


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
    routed: Routed = experts_here,
    stretch: Stretch = alone,
) -> tuple[tuple[jax.Array, Seen], tuple[Any, dict[str, jax.Array]]]:
    """This device's part of the loss and of the gradients of parameters and rows.

    The parts of all devices add up to the mean over the whole batch. With `training.accumulate`
    the sequences go through the network in so many parts, one after another.
    """
    parts = run.training.accumulate

    def loss_of(params: Any, rows: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, Seen]:
        loss, seen = mean_loss(
            params, rows, state.router_bias, batch, run, whole, routed, stretch)
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
    routed: Routed = experts_here,
    stretch: Stretch = alone,
) -> tuple[jax.Array, Observed]:
    """Cross-entropy of every target in nats, float32 [B, T], and what could be observed."""
    return _lost(token_losses, params, rows, router_bias, batch, run, whole, routed, stretch)


def mean_loss(
    params: Any,
    rows: dict[str, jax.Array],
    router_bias: Any,
    batch: Batch,
    run: RunConfig,
    whole: Whole = as_they_are,
    routed: Routed = experts_here,
    stretch: Stretch = alone,
) -> tuple[jax.Array, Observed]:
    """The mean of `losses`, whose gradient costs less."""
    return _lost(mean_token_loss, params, rows, router_bias, batch, run, whole, routed, stretch)


def _lost(
    of: Callable[..., jax.Array], params: Any, rows: dict[str, jax.Array], router_bias: Any,
    batch: Batch, run: RunConfig, whole: Whole, routed: Routed, stretch: Stretch,
) -> tuple[jax.Array, Observed]:
    """`of` what the head reads, the streams after the last block and the targets."""
    x_BTMD, seen = transformer.body(params, batch["tokens_BT"], rows, router_bias, run.model,
                                    batch["starts_BT"], whole, routed, stretch)
    head = transformer.head_params(params, run.model, whole)
    return of(head, x_BTMD, batch["targets_BT"], run.model), seen


def evaluation_step(
    run: RunConfig, addressing: Addressing, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]:
    """(state, batch) -> the weighted sum of the losses and the sum of the weights.

    The state is without what only training needs (`state.to_be_read`). The batch also has
    weights_BT, float32.
    """
    mesh = mesh or placement.single_mesh()
    placement.check(run, mesh)
    settled = placement.settled(run, mesh)
    split, memory = placement.param_split(run, mesh), placement.local_memory(run, mesh)
    routed, stretch = placement.routed(run, mesh), stretch_of(mesh)

    def step(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        lookup = memory.lookup(state.tables, row_ids(run, addressing, batch, stretch))
        loss_BT, _ = losses(
            state.params, lookup.rows, state.router_bias, batch, settled, split.whole, routed,
            stretch)
        return (_everywhere(jnp.sum(loss_BT * batch["weights_BT"])),
                _everywhere(jnp.sum(batch["weights_BT"])))

    specs = to_be_read(placement.state_specs(run, mesh))
    return jax.shard_map(step, mesh=mesh, in_specs=(specs, BATCH),
                         out_specs=PartitionSpec(), check_vma=False)


def _everywhere(value: Any) -> jax.Array:
    """The sum over all devices."""
    return jax.lax.psum(jnp.asarray(value, jnp.float32), AXES)


def _if(finite: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _rebalanced(run: RunConfig, router_bias: Any, loads: list[jax.Array | None]) -> Any:
    if run.model.moe is None or run.training.freeze == "backbone":
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


def _exchange_checks(
    agree: dict[str, jax.Array], combined: dict[str, RowGradients]
) -> Metrics:
    """How many tables have rows that did not reach their owners, or a gradient that is all 0."""
    agreed = jnp.stack(list(agree.values()))
    squares = _everywhere(jnp.stack([each.square for each in combined.values()]))
    return {
        "exchange/disagreements": jnp.sum(~agreed, dtype=jnp.float32),
        "exchange/empty_gradients": jnp.sum(squares == 0, dtype=jnp.float32),
    }


def _exchange_metrics(lookup: LocalLookup, combined: dict[str, RowGradients]) -> Metrics:
    """Sums over all sites and devices; the rounds are those of the site that needed most."""
    routes, fetched = lookup.routes.values(), lookup.fetched.values()
    if not routes:
        return {}
    ids = sum(route.order_N.size for route in routes) * _everywhere(1)
    unique = _everywhere(sum(each.unique for each in fetched))
    return {
        "engram/rows_touched": _everywhere(sum(each.touched for each in combined.values())),
        "engram/unique_share": unique / ids,
        "engram/ids_out_of_range": _everywhere(sum(r.outside for r in routes)),
        "exchange/rows_asked": unique,
        "exchange/overflow_rows": _everywhere(sum(each.overflow for each in fetched)),
        "exchange/rounds": jnp.max(jnp.stack([each.rounds for each in fetched])).astype(
            jnp.float32),
    }
