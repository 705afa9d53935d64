"""One backbone, and half a million parameters more: in a table, in experts, in a dense FFN."""

import dataclasses
from collections.abc import Sequence

from engram_jax.config import RunConfig
from engram_jax.costs.accounting import account
from engram_jax.recipes import tiny, without_memory
from engram_jax.settings import changed
from engram_jax.sweeps.sweep import seeded
from experiments.capacity.facts import TEXT, TOKENIZER
from experiments.tuning.best import tuned

FOLDER = "runs/facts"  # `python -m experiments.capacity.facts` writes it
SCALES = {"tiny": (4096, 64)}  # slots of the table, and of one that is too small for the facts


def arms(scale: str) -> list[RunConfig]:
    """Table, experts and dense have as many parameters in all, within 2 %; FLOPs are not equal."""
    slots, few = SCALES[scale]
    table = _with(tiny(), "table", {"model.engram.rows_per_head": (slots, slots)})
    small = _with(tiny(), "small-table", {"model.engram.rows_per_head": (few, few)})
    bare = _with(without_memory(tiny()), "no-memory", {})
    assert bare.model.moe is not None
    more = account(table).total_params - account(bare).total_params
    one = _with(bare, "x", {"model.moe.experts": bare.model.moe.experts + 1})
    experts = round(more / (account(one).total_params - account(bare).total_params))
    ffn = round(more / (3 * bare.model.width))  # the first block alone is dense
    return [
        table,
        _with(bare, "experts", {"model.moe.experts": bare.model.moe.experts + experts}),
        _with(bare, "dense", {"model.ffn": bare.model.ffn + ffn}),
        _with(table, "table-raw-keys", {"model.engram.compress": False}),
        small,
        bare,
    ]


def _with(run: RunConfig, name: str, fields: dict[str, object]) -> RunConfig:
    return dataclasses.replace(changed(run, fields), name=name)


def runs(scale: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Every arm with every seed."""
    text = {"data.path": f"{FOLDER}/{TEXT}", "data.tokenizer": f"{FOLDER}/{TOKENIZER}",
            "data.validation_fraction": 0.02}
    return seeded([tuned(changed(arm, text)) for arm in arms(scale)], seeds)
