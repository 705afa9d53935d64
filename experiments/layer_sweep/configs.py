"""One module before each block in turn, and the same rows split over two."""

from collections.abc import Sequence

from engram_jax.config import RunConfig
from engram_jax.costs.allocation import matched_baseline
from engram_jax.recipes import engram_3b, small
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.committed import tiny


def _tiny() -> RunConfig:
    return changed(tiny(), {"model.depth": 6})


SCALES = {  # the run, and the two blocks of the split
    "tiny": (_tiny, (1, 3)),
    "small": (small, (1, 4)),
    "paper": (engram_3b, (1, 5)),
}


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every arm with every seed: layer-L, layers-A-B, no-memory."""
    make, split = SCALES[scale]
    base = make()
    arms = [*(_at(base, (layer,)) for layer in range(base.model.depth)), _at(base, split)]
    return seeded([*arms, matched_baseline(arms[0])], seeds)


def _at(base: RunConfig, layers: tuple[int, ...]) -> RunConfig:
    """The run with its rows before these blocks, as many altogether however many they are."""
    engram = base.model.engram
    assert engram is not None
    rows = tuple(count * len(engram.layers) // len(layers) for count in engram.rows_per_head)
    name = f"layer{'s' if len(layers) > 1 else ''}-{'-'.join(map(str, layers))}"
    return changed(base, {"name": name, "model.engram.layers": layers,
                          "model.engram.rows_per_head": rows})
