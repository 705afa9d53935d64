"""One backbone at one cost: without memory, with tables of several sizes, with OverEncoding."""

from collections.abc import Sequence

from engram_jax.config import RunConfig
from engram_jax.costs.accounting import account
from engram_jax.costs.allocation import matched_baseline, with_flops
from engram_jax.recipes import engram_3b, small, with_over_encoding
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.committed import tiny

VOCABULARY = 129_280  # the paper's sizes are multiples of it

SCALES = {  # the run, Engram's slots, OverEncoding's slots
    "tiny": (tiny, (1024, 4096, 16_384, 65_536), (4096, 16_384, 65_536)),
    "small": (small, (16_384, 65_536, 262_144, 1_048_576), (65_536, 1_048_576)),
    "paper": (engram_3b, tuple(VOCABULARY * times for times in (2, 5, 10, 15, 20, 30, 50, 80)),
              (VOCABULARY * 10, VOCABULARY * 20, VOCABULARY * 40)),
}


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every arm with every seed."""
    make, slots, over_slots = SCALES[scale]
    base = make()
    return seeded([matched_baseline(base), *(with_slots(base, count) for count in slots),
                   *(_over(with_slots(base, count)) for count in over_slots)], seeds)


def with_slots(base: RunConfig, slots: int) -> RunConfig:
    """The run with so many rows in each head's table, named engram-SLOTS."""
    assert base.model.engram is not None
    orders = len(base.model.engram.rows_per_head)
    return changed(base, {"name": f"engram-{slots}",
                          "model.engram.rows_per_head": (slots,) * orders})


def _over(run: RunConfig) -> RunConfig:
    """OverEncoding of the same slots, its dense FFN wider by what Engram's projections cost."""
    over = changed(with_over_encoding(run), {"name": run.name.replace("engram", "over-encoding")})
    return with_flops(over, account(run).flops_per_token)
