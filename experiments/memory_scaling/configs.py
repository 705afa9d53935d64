"""One backbone: without memory, with four sizes of Engram, with OverEncoding of the largest."""

import dataclasses

from engram_jax.config import RunConfig
from engram_jax.recipes import tiny, with_over_encoding, without_memory

SLOTS = (1024, 4096, 16_384, 65_536)


def runs() -> list[RunConfig]:
    """The runs of the demo; data order and backbone start are the same in all of them."""
    base = tiny()
    engrams = [_with_slots(base, slots) for slots in SLOTS]
    over = with_over_encoding(engrams[-1])
    return [
        dataclasses.replace(without_memory(base), name="no-memory"),
        *engrams,
        dataclasses.replace(over, name=f"over-encoding-{SLOTS[-1]}"),
    ]


def _with_slots(base: RunConfig, slots: int) -> RunConfig:
    assert base.model.engram is not None
    orders = len(base.model.engram.rows_per_head)
    engram = dataclasses.replace(base.model.engram, rows_per_head=(slots,) * orders)
    model = dataclasses.replace(base.model, engram=engram)
    return dataclasses.replace(base, name=f"engram-{slots}", model=model)
