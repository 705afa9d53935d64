"""One memory in two blocks, and what is lost without each of its parts."""

from collections.abc import Sequence
from typing import Any

from engram_jax.config import EngramConfig, RunConfig
from engram_jax.costs.accounting import account
from engram_jax.costs.allocation import with_flops
from engram_jax.recipes import engram_3b, small, without_memory
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.committed import tiny


def _tiny() -> RunConfig:
    """Two residual streams and two modules, so that there are branches and layers to take away."""
    return changed(tiny(), {
        "model.depth": 4, "model.streams": 2, "model.engram.layers": (1, 3),
        "model.engram.rows_per_head": (8192, 8192)})


SCALES = {"tiny": _tiny, "small": small, "paper": engram_3b}


def arms(base: RunConfig) -> list[RunConfig]:
    """The reference first, then each part taken away or changed; no memory last."""
    memory = base.model.engram
    assert memory is not None
    rows = memory.rows_per_head
    start = 0.0 if memory.table_std else 0.02

    def arm(name: str, **fields: Any) -> RunConfig:
        return _with(base, name, changed(memory, fields))

    return [
        _with(base, "reference", memory),
        arm("one-branch", per_branch=False),
        arm("no-compression", compress=False),
        arm("no-gate", gated=False),
        arm("4-grams", max_order=4, rows_per_head=(sum(rows) // 3,) * 3,
            dilation=memory.conv_dilation),
        arm("no-convolution", kernel=0),
        arm("no-signed-root", signed_root=not memory.signed_root),
        arm("random-start" if start else "zero-start", table_std=start),
        arm("one-table", one_table=True,
            rows_per_head=tuple(count * len(memory.layers) for count in rows)),
        *(_with_rate(base, multiplier) for multiplier in (1.0, 20.0)),
        changed(without_memory(base), {"name": "no-memory"}),
    ]


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every arm with every seed; dense FFNs make up for the FLOPs that arms differ in."""
    base = SCALES[scale]()
    cost = account(base).flops_per_token
    return seeded([with_flops(arm, cost) for arm in arms(base)], seeds)


def _with(base: RunConfig, name: str, engram: EngramConfig) -> RunConfig:
    return changed(base, {"name": name, "model.engram": engram})


def _with_rate(base: RunConfig, multiplier: float) -> RunConfig:
    return changed(base, {"name": f"rate-x{multiplier:g}",
                          "optimizer.table_multiplier": multiplier})
