"""One step: hash, look up, forward, backward with respect to rows, update.

Shapes: B batch, T time, H rows of a token, C columns of a row, U slots for distinct rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.config import RunConfig
from engram_jax.memory import exchange
from engram_jax.memory.exchange import UniqueRows
from engram_jax.memory.sites import Addressing, sites
from engram_jax.model import documents, moe, transformer
from engram_jax.model.transformer import Observed
from engram_jax.training.optimizers import optimizer, schedule
from engram_jax.training.state import TrainState, row_optimizer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def train_step(
    run: RunConfig, addressing: Addressing
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure step of a run, (state, batch) -> (state, metrics); jit it with the state donated.

    A batch has tokens_BT, targets_BT int32 and starts_BT bool. Metrics are float32 scalars. A step
    whose gradient is not finite changes nothing but the step's number.
    """
    transform = optimizer(run.optimizer)
    rate = schedule(run.optimizer, run.training.steps)
    rows_update = row_optimizer(run).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        ids = row_ids(run, addressing, batch)
        rows = read(run, state.tables, ids)
        grad = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
        (loss, seen), (grads, row_grads) = grad(
            state.params, rows, state.router_bias, batch, run)
        unique = {name: exchange.combine(ids[name].reshape(-1), _flat(row_grads[name]))
                  for name in ids}
        norm = optax.tree.norm((grads, {n: u.grads_UD for n, u in unique.items()}))
        finite, scale = jnp.isfinite(norm), jnp.minimum(1.0, run.optimizer.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)

        step_number, learning_rate = state.step + 1, rate(state.step)
        updates = jax.tree.map(lambda u: u * learning_rate, updates)
        tables, table_state = {}, {}
        for site in sites(run.model):
            found = _scaled(unique[site.name], scale, finite)
            tables[site.name], table_state[site.name] = rows_update(
                site.layout, state.tables[site.name], state.table_state[site.name], found,
                step_number, learning_rate * run.optimizer.table_multiplier)
        new = TrainState(
            step=step_number,
            params=_if(finite, optax.apply_updates(state.params, updates), state.params),
            router_bias=_if(finite, _rebalanced(run, state.router_bias, seen), state.router_bias),
            opt_state=_if(finite, opt_state, state.opt_state),
            tables=tables,
            table_state=table_state,
        )
        return new, _metrics(loss, norm, learning_rate, seen, unique, finite)

    return step


def row_ids(run: RunConfig, addressing: Addressing, batch: Batch) -> dict[str, jax.Array]:
    """For each site, the row ids int32 [B, T, H] that the batch asks for."""
    position_BT = None
    if run.model.isolate_documents:
        position_BT = documents.documents(batch["starts_BT"]).position_BT
    return addressing.ids(batch["tokens_BT"], position_BT)


def read(
    run: RunConfig, tables: dict[str, jax.Array], ids: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """For each site, its rows [B, T, H, C]."""
    return {site.name: exchange.lookup(site.layout, tables[site.name], ids[site.name])
            for site in sites(run.model)}


def losses(
    params: Any, rows: dict[str, jax.Array], router_bias: Any, batch: Batch, run: RunConfig
) -> tuple[jax.Array, Observed]:
    """Cross-entropy of every target in nats, float32 [B, T], and what could be observed."""
    logits_BTV, seen = transformer.apply(
        params, batch["tokens_BT"], rows, router_bias, run.model, batch["starts_BT"])
    return cross_entropy(logits_BTV, batch["targets_BT"]), seen


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], float32 [B, T].

    The target's logit is picked by a masked sum: its gradient then fuses with the softmax's, where
    that of an indexed read is a scatter into an array of the logits' size.
    """
    vocabulary_11V = jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32)[None, None]
    hit_BTV = vocabulary_11V == targets_BT[..., None]
    picked_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def mean_loss(
    params: Any, rows: dict[str, jax.Array], router_bias: Any, batch: Batch, run: RunConfig
) -> tuple[jax.Array, Observed]:
    """The mean of `losses`."""
    loss_BT, seen = losses(params, rows, router_bias, batch, run)
    return jnp.mean(loss_BT), seen


def evaluation_step(
    run: RunConfig, addressing: Addressing
) -> Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]:
    """(state, batch) -> the weighted sum of the losses and the sum of the weights.

    The batch also has weights_BT, float32.
    """

    def step(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rows = read(run, state.tables, row_ids(run, addressing, batch))
        loss_BT, _ = losses(state.params, rows, state.router_bias, batch, run)
        return jnp.sum(loss_BT * batch["weights_BT"]), jnp.sum(batch["weights_BT"])

    return step


def _flat(grads_BTHC: jax.Array) -> jax.Array:
    return grads_BTHC.reshape(-1, grads_BTHC.shape[-1])


def _scaled(rows: UniqueRows, scale: jax.Array, finite: jax.Array) -> UniqueRows:
    """Clipped gradients; where the step is bad, no row at all."""
    ids_U = jnp.where(finite, rows.ids_U, exchange.UNUSED)
    return rows._replace(ids_U=ids_U, grads_UD=rows.grads_UD * scale)


def _if(finite: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _rebalanced(run: RunConfig, router_bias: Any, seen: Observed) -> Any:
    if run.model.moe is None:
        return router_bias
    rate = run.model.moe.balance_rate
    return [None if bias is None or load is None else moe.rebalanced(bias, load, rate)
            for bias, load in zip(router_bias, seen.loads, strict=True)]


def _metrics(
    loss: jax.Array,
    norm: jax.Array,
    learning_rate: jax.Array,
    seen: Observed,
    unique: dict[str, UniqueRows],
    finite: jax.Array,
) -> Metrics:
    metrics = {
        "learning/loss": loss,
        "learning/grad_norm": norm,
        "learning/current_learning_rate": learning_rate,
        "learning/skipped": 1.0 - finite.astype(jnp.float32),
    }
    loads = [load for load in seen.loads if load is not None]
    if loads:
        metrics["moe/max_load_over_mean"] = jnp.max(
            jnp.stack([jnp.max(load) * load.shape[-1] for load in loads]))
    if unique:
        asked = sum(u.ids_U.size for u in unique.values())
        touched = sum(u.used for u in unique.values())
        metrics["engram/rows_touched"] = jnp.asarray(touched, jnp.float32)
        metrics["engram/unique_share"] = jnp.asarray(touched / asked, jnp.float32)
    if seen.gates:
        metrics["engram/gate_mean"] = jnp.mean(
            jnp.stack([jnp.mean(gate) for gate in seen.gates.values()]))
    return metrics
