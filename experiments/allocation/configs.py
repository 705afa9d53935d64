"""Sparse parameters divided between experts and memory, at two budgets of FLOPs."""

from collections.abc import Sequence

from engram_jax.config import EngramConfig, MoEConfig, RunConfig
from engram_jax.costs.accounting import account
from engram_jax.costs.allocation import Allocation, allocate
from engram_jax.recipes import moe_6b, moe_10b, small, without_memory
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.committed import tiny

RHOS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _tiny(name: str, width: int, steps: int) -> tuple[RunConfig, EngramConfig]:
    """Many small experts, so that experts are nine tenths of the parameters."""
    run = tiny()
    assert run.model.engram is not None
    moe = MoEConfig(experts=96, top_k=4, shared=1, expert_ffn=width // 4, dense_layers=1)
    return changed(without_memory(run), {
        "name": name, "model.width": width, "model.ffn": 4 * width, "model.moe": moe,
        "training.steps": steps}), run.model.engram


def _small(name: str, steps: int) -> tuple[RunConfig, EngramConfig]:
    run = small()
    assert run.model.engram is not None
    return changed(without_memory(run), {
        "name": name, "model.ffn": 4096,  # so wide that it can pay for Engram's projections
        "model.moe": MoEConfig(experts=64, top_k=4, shared=1, expert_ffn=256),
        "training.steps": steps}), run.model.engram


PAPER = EngramConfig(layers=(1, 5), rows_per_head=(2, 2), heads=8, head_dim=80, shards=1024)

SCALES = {  # undivided models, one a budget, and the memory
    "tiny": (_tiny("small-budget", 64, 100), _tiny("large-budget", 96, 170)),
    "small": (_small("small-budget", 3000), _small("large-budget", 9000)),
    "paper": ((moe_6b(), PAPER), (moe_10b(), PAPER)),
}


def allocations(scale: str) -> list[Allocation]:
    """Every point of both budgets."""
    return [allocate(base, rho, memory) for base, memory in SCALES[scale] for rho in RHOS]


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every point with every seed, named BUDGET-rho-RHO."""
    arms = [_named(base, rho, memory) for base, memory in SCALES[scale] for rho in RHOS]
    return seeded(arms, seeds)


def _named(base: RunConfig, rho: float, memory: EngramConfig) -> RunConfig:
    return changed(allocate(base, rho, memory).run, {"name": f"{base.name}-rho-{rho:g}"})


def described(scale: str) -> str:
    """Targets and what is met, a line each point."""
    lines = [f"{'model':<16}{'rho':>5}{'met':>8}{'experts':>9}{'rows per head':>15}{'P_tot':>16}"
             f"{'off':>9}{'P_act':>15}{'FLOPs/token':>16}{'off':>9}"]
    for point in allocations(scale):
        numbers, model = account(point.run), point.run.model
        assert model.moe is not None
        rows = model.engram.rows_per_head[0] if model.engram else 0
        name = point.run.name.partition("-rho-")[0]
        lines.append(
            f"{name:<16}{point.target:>5}{point.rho:>8.4f}{model.moe.experts:>9}{rows:>15,}"
            f"{numbers.active_params + numbers.sparse_params:>16,}{point.parameters_off:>+9.3%}"
            f"{numbers.active_params:>15,}{numbers.flops_per_token:>16,}{point.flops_off:>+9.3%}")
    return "\n".join(lines)
