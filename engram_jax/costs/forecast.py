"""What a run will take, before it runs: parameters, FLOPs, memory and time (`sweep --dry-run`).

Time is that of the run's FLOPs at `EFFICIENCY` of what a matrix product reaches on the first device
now; it is a guess of the right order. Memory is that of state and gradients, without activations:
what it refuses cannot fit, and what it lets through may still be too large (`plan` knows for TPUs).
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engram_jax.config import RunConfig, require
from engram_jax.costs.accounting import account, short
from engram_jax.training import placement
from engram_jax.training.fitting import device_bytes
from engram_jax.training.state import abstract_state

EFFICIENCY = 0.3
PROBE = 1024  # rows and columns of the matrices that are timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one run will take.

    Attributes:
      run: the run.
      tokens: that it trains on.
      flops: of the whole training.
      memory_bytes: of all devices together: state and gradients.
      available_bytes: of all devices together.
      seconds: a guess, see the module.
    """

    run: RunConfig
    tokens: int
    flops: float
    memory_bytes: int
    available_bytes: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.available_bytes


def forecast(run: RunConfig, mesh: Mesh | None = None) -> Forecast:
    """Forecast one run on `mesh` (None: on all devices).

    Raises:
      UserError: the mesh does not divide the run.
    """
    mesh = mesh or placement.chosen_mesh()
    placement.check(run, mesh)
    tokens = run.training.steps * run.data.batch_size * run.data.sequence_length
    flops = float(account(run).flops_per_token) * tokens
    return Forecast(
        run=run, tokens=tokens, flops=flops, memory_bytes=_memory_bytes(run),
        available_bytes=device_bytes(mesh) * mesh.size,
        seconds=flops / (EFFICIENCY * mesh.size * _flops_a_second(run.model.compute_dtype)))


def check(forecasts: Sequence[Forecast], at_once: int = 1) -> None:
    """Refuse runs that do not fit (UserError), or that do not `at_once` on the same devices."""
    require(at_once >= 1, "at-once", at_once, "must be at least 1")
    for each in forecasts:
        require(each.fits, "run", each.run.name,
                f"needs {_gb(each.memory_bytes)} without activations, and the devices have "
                f"{_gb(each.available_bytes)}: take more of them or a smaller scale")
    together = sum(sorted(each.memory_bytes for each in forecasts)[-at_once:])
    if forecasts:
        available = forecasts[0].available_bytes
        require(together <= available, "at-once", at_once,
                f"runs need {_gb(together)} without activations, and the devices have "
                f"{_gb(available)}: take fewer at once")


def table(forecasts: Sequence[Forecast]) -> str:
    """A line each run, and their sums."""
    head = (f"{'run':<34}{'total':>9}{'active':>9}{'tables':>9}{'experts':>9}{'rho':>7}"
            f"{'FLOPs/token':>13}{'tokens':>9}{'FLOPs':>10}{'needs':>11}{'time':>11}  fits")
    lines = [head, "-" * len(head)]
    for each in forecasts:
        numbers, moe = account(each.run), each.run.model.moe
        rho = "-" if numbers.rho is None else f"{numbers.rho:.3f}"
        lines.append(
            f"{each.run.name:<34}{short(numbers.total_params):>9}"
            f"{short(numbers.active_params):>9}{short(numbers.engram_params):>9}"
            f"{moe.experts if moe else '-':>9}{rho:>7}{short(numbers.flops_per_token):>13}"
            f"{short(each.tokens):>9}{each.flops:>10.2e}{_gb(each.memory_bytes):>11}"
            f"{_duration(each.seconds):>11}  {'yes' if each.fits else 'no'}")
    lines.append(f"{len(forecasts)} runs, {sum(each.flops for each in forecasts):.2e} FLOPs, about "
                 f"{_duration(sum(each.seconds for each in forecasts))} one after another on "
                 f"{jax.device_count()} {jax.devices()[0].device_kind}")
    return "\n".join(lines)


def _memory_bytes(run: RunConfig) -> int:
    """State, and gradients of the parameters in float32."""
    state = abstract_state(run)
    return (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            + sum(4 * leaf.size for leaf in jax.tree.leaves(state.params)))


@functools.cache
def _flops_a_second(dtype: str) -> float:
    """What a matrix product reaches on the first device."""
    matrix = jnp.ones((PROBE, PROBE), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * PROBE**3 / best


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} s"
