"""What rows cost on a mesh: this library's exchange against a gather from a sharded table.

Both arms train the same model on the same real text on eight devices; what differs is how rows
come and how their gradients go. The rival is what `table[ids]` becomes when the table is sharded
and the compiler (GSPMD) finds the collectives: a dense gradient, and optax's Adam over the table.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax import recipes
from engram_jax.config import RunConfig, require
from engram_jax.costs.collectives import Collective, collectives
from engram_jax.data.batches import train_batches
from engram_jax.hashing.addressing import Addressing, sites
from engram_jax.model import transformer
from engram_jax.runs.reader import open_inputs
from engram_jax.settings import changed
from engram_jax.tables.layout import gather_rows
from engram_jax.training import placement
from engram_jax.training.capacity import with_capacity
from engram_jax.training.fsdp import AXES, BATCH
from engram_jax.training.optimizers import optimizer
from engram_jax.training.state import TrainState, init_state
from engram_jax.training.step import Batch, gradients, row_ids, train_step

DEVICES = 8
ROWS_PER_HEAD = 524_288  # 4.2M rows of 16 columns in all
STEPS = 9
# Bytes that a device of P puts on the wire for each byte that it puts in (ring algorithms).
WIRE: dict[str, Callable[[int], float]] = {
    "all-to-all": lambda p: (p - 1) / p,
    "reduce-scatter": lambda p: (p - 1) / p,
    "all-reduce": lambda p: 2 * (p - 1) / p,
    "all-gather": lambda p: p - 1,
    "collective-permute": lambda p: 1,
}
# A round after the first fetches its rows once and sends its gradients twice: for the norm, then
# for the update. So it costs half as much again as the first.
LATER_ROUND = 1.5


def exchange_benchmark(steps: int = STEPS) -> dict[str, Any]:
    """Bytes and seconds of a step of `tiny`, 2048 tokens a device, on eight devices.

    Returns:
      `bytes_per_device`, rows there and gradients back on the wire, in all rounds;
      `lower_bound`, 2 (1 - 1/P) row bytes of the distinct rows that a device needs;
      `gspmd_bytes`, all that the sharded gather and its gradient put on the wire; `id_bytes`,
      the ids of the exchange; `ratio` of the first two and `gspmd_ratio` of the third and first;
      `rounds` (mean), `unique_share`, `row_capacity`; `step_s` and `gspmd_step_s`, medians of
      `steps` steps that took turns.

    Raises:
      UserError: there are not eight devices.
    """
    require(len(jax.devices()) >= DEVICES, "devices", len(jax.devices()),
            f"the benchmark needs {DEVICES}")
    mesh = placement.make_mesh(1, DEVICES)
    run = _workload()
    inputs = open_inputs(run)
    run = with_capacity(run, inputs.addressing, train_batches(inputs.tokens, run.data), mesh)
    batches = train_batches(inputs.tokens, run.data)
    ours, theirs = _exchange(run, inputs.addressing, mesh), _gspmd(run, inputs.addressing, mesh)
    times, seen = [], []
    for _ in range(steps + 1):  # the first compiles
        batch = jax.block_until_ready(placement.put(next(batches), mesh))
        seconds, metrics = _timed(ours, batch)
        times.append((seconds, _timed(theirs, batch)[0]))
        seen.append({name: float(value) for name, value in metrics.items()})
    mean = {name: statistics.mean(row[name] for row in seen) for name in seen[0]}
    ours_s, theirs_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {
        **_bytes(run, mesh, ours.compiled(), theirs.compiled(), mean),
        "rounds": mean["exchange/rounds"],
        "unique_share": mean["engram/unique_share"],
        "row_capacity": run.training.row_capacity,
        "table_rows": sites(run.model)[0].rows,
        "tokens_per_device": run.data.batch_size * run.data.sequence_length // DEVICES,
        "step_s": ours_s,
        "gspmd_step_s": theirs_s,
        "devices": DEVICES,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _workload() -> RunConfig:
    return changed(recipes.tiny(), {
        "model.engram.rows_per_head": (ROWS_PER_HEAD, ROWS_PER_HEAD), "data.batch_size": 128})


class _Arm:
    """A jitted step that keeps its own state."""

    def __init__(self, step: Callable[..., Any], state: Any):
        self._jitted, self._state = jax.jit(step, donate_argnums=0), state
        self._shapes: Any = None

    def __call__(self, batch: Batch) -> Any:
        self._shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (self._state, batch))
        self._state, out = self._jitted(self._state, batch)
        return out

    def compiled(self) -> Any:
        return self._jitted.lower(*self._shapes).compile()


def _exchange(run: RunConfig, addressing: Addressing, mesh: Mesh) -> _Arm:
    return _Arm(train_step(run, addressing, mesh), _state(run, mesh))


def _state(run: RunConfig, mesh: Mesh) -> TrainState:
    return jax.jit(lambda: init_state(run), out_shardings=placement.shardings(run, mesh))()


def _gspmd(run: RunConfig, addressing: Addressing, mesh: Mesh) -> _Arm:
    """The same network by the same shard_map, the table's part by the compiler."""
    split, transform = placement.param_split(run, mesh), optax.adam(run.optimizer.learning_rate)
    backbone = optimizer(run.optimizer, transformer.declared(run.model), split.by_matrix)
    specs, spread = placement.state_specs(run, mesh), BATCH

    def network(state: TrainState, rows: Any, batch: Batch) -> Any:
        (loss, _), (grads, row_grads) = gradients(
            run, state, rows, batch, split.whole, mesh.size)
        updates, opt_state = backbone.update(
            split.summed(grads), state.opt_state, state.params)
        updates = jax.tree.map(lambda u: u * run.optimizer.learning_rate, updates)
        params = optax.apply_updates(state.params, updates)
        return jax.lax.psum(loss, AXES), params, opt_state, row_grads

    mapped = jax.shard_map(
        network, mesh=mesh, in_specs=(specs, spread, spread), check_vma=False,
        out_specs=(PartitionSpec(), specs.params, specs.opt_state, spread))

    def step(carry: tuple[TrainState, Any], batch: Batch) -> tuple[Any, jax.Array]:
        state, moments = carry
        ids = row_ids(run, addressing, batch)
        spread_rows = NamedSharding(mesh, spread)
        rows, back = jax.vjp(lambda tables: jax.lax.with_sharding_constraint(
            gather_rows(run.model, tables, ids), spread_rows), state.tables)
        loss, params, opt_state, row_grads = mapped(state, rows, batch)
        updates, moments = transform.update(back(row_grads)[0], moments)
        tables: Any = optax.apply_updates(state.tables, updates)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, tables=tables)
        return (state, moments), loss

    state = _state(run, mesh)
    return _Arm(step, (state, jax.jit(transform.init)(state.tables)))


def _timed(arm: _Arm, batch: Batch) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(arm(batch))
    return time.perf_counter() - start, out


def _bytes(
    run: RunConfig, mesh: Mesh, ours: Any, theirs: Any, mean: dict[str, float]
) -> dict[str, float]:
    """Row bytes of both arms, from the collectives of their compiled steps."""
    dims = {site.dim for site in sites(run.model)}
    ours_found = collectives(ours)
    first = _wire(one for one in ours_found
                  if one.kind == "all-to-all" and one.exact and _moves_rows(one, dims))
    ids = _wire(one for one in ours_found
                if one.kind == "all-to-all" and one.exact and one.shapes[0][0] == "s32")
    rows = first * (1 + LATER_ROUND * (mean["exchange/rounds"] - 1))
    row_bytes = 4 * np.mean(sorted(dims))
    bound = 2 * (1 - 1 / mesh.size) * row_bytes * mean["exchange/rows_asked"] / mesh.size
    parameters = {leaf.shape for leaf in jax.tree.leaves(placement.placed_state(run, mesh).params)}
    rival = _wire(one for one in collectives(theirs)
                  if "gather_rows" in one.source or (_moves_rows(one, dims)
                  and not parameters & {shape for _, shape in one.shapes}))
    return {"bytes_per_device": rows, "lower_bound": float(bound), "gspmd_bytes": rival,
            "id_bytes": ids, "ratio": rows / float(bound), "gspmd_ratio": rival / rows}


def _moves_rows(one: Collective, dims: set[int]) -> bool:
    """Are these rows of a table, or gradients of some?"""
    return any(dtype == "f32" and shape and shape[-1] in dims for dtype, shape in one.shapes)


def _wire(calls: Iterable[Collective]) -> float:
    """Bytes that a device puts on the wire."""
    return sum(
        one.times * one.bytes * WIRE[one.kind](len(one.groups[0]) if one.groups else DEVICES)
        for one in calls)
