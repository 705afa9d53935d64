"""Measure LogitLens and CKA of finished sweeps, and write results.csv beside this file.

    python -m experiments.looking_inside.measure LAYER_SWEEP MEMORY_SCALING_PROSE
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from engram_jax.errors import MachineError, UserError
from engram_jax.insides.analyses import analyze
from engram_jax.sweeps.sweep import to_csv

SEEDS = (0, 1, 2)
BASELINE = "no-memory"
ARMS = (("layer-1", "layers-1-3"), ("engram-65536",))  # with memory, of each of the two sweeps

Row = dict[str, Any]


def lens_rows(sweep: epath.Path, arms: Sequence[str]) -> Iterator[Row]:
    """KL from the last layer of every run and layer, nats."""
    for arm in (BASELINE, *arms):
        for seed in SEEDS:
            for values in analyze("lens", [sweep / f"{arm}-seed{seed}"]).values():
                for layer, value in enumerate(values):
                    yield _row("kl", arm, seed, layer=layer, value=value)


def cka_rows(sweep: epath.Path, arms: Sequence[str]) -> Iterator[Row]:
    """CKA of each layer of an arm with each (`of`) of the baseline at the next seed, and the soft
    alignment of each layer."""
    for arm in (BASELINE, *arms):
        for seed in SEEDS:
            other = SEEDS[(seed + 1) % len(SEEDS)]
            pair = [sweep / f"{BASELINE}-seed{other}", sweep / f"{arm}-seed{seed}"]
            (alike,) = analyze("cka", pair)["with"].values()
            for of, values in enumerate(alike["cka"]):
                for layer, value in enumerate(values):
                    yield _row("cka", arm, seed, layer=layer, of=of, value=value)
            for layer, value in enumerate(alike["soft_alignment"]):
                yield _row("alignment", arm, seed, layer=layer, value=value)


def _row(measure: str, arm: str, seed: int, *, layer: int, value: float, of: int | str = "") -> Row:
    return {"measure": measure, "arm": arm, "seed": seed, "layer": layer, "of": of, "value": value}


def measured(sweeps: Sequence[epath.PathLike]) -> list[Row]:
    """All rows of both sweeps, each with the name of its text."""
    return [{"text": text, **row}
            for text, folder, arms in zip(("code", "prose"), sweeps, ARMS, strict=True)
            for rows in (lens_rows, cka_rows) for row in rows(epath.Path(folder), arms)]


if __name__ == "__main__":
    if len(sys.argv) != 1 + len(ARMS):
        sys.exit("two folders are needed, of layer_sweep on code and of memory_scaling on prose")
    try:
        Path(__file__).with_name("results.csv").write_text(to_csv(measured(sys.argv[1:])))
    except (UserError, MachineError) as error:
        sys.exit(f"{error}")
