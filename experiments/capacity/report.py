"""How many facts are recalled, by arm and by how often they were told."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from engram_jax.insides.observing import Opened, open_run
from engram_jax.insides.suppression import token_losses
from engram_jax.results import figures
from engram_jax.results.arms import Result
from engram_jax.results.statistics import Interval, interval, paired
from engram_jax.runs.directory import RunDirectory
from experiments.capacity.facts import Fact, read

FIGURE = "recall_against_times.png"
RECALLED = math.log(2)  # nats: the answer has at least half of the probability
LINES = 32  # facts of a sequence that is asked
COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.SKY, figures.DARK, "#CC79A7")

Row = dict[str, Any]


def measured(results: Sequence[Result], folder: epath.Path) -> list[Row]:
    """A row for each run, kind of facts and number of times: what its last state recalls."""
    rows = []
    for result in results:
        opened = open_run(RunDirectory(folder / result["name"]))
        told = read(Path(opened.run.data.path).parent)
        for each in recall(opened, told):
            rows.append({"name": result["name"], "seed": result["seed"], "loss": result["loss"],
                         "total_params": result["total_params"],
                         "memory_params": result["memory_params"], "tokens": result["tokens"],
                         **each})
    return rows


def recall(opened: Opened, told: Sequence[Fact]) -> Iterator[Row]:
    """Facts asked and recalled of each kind and number of times, with memory's rows and with zeros
    in their place."""
    losses_N, without_N = (answer_losses(opened, told, scale) for scale in (1.0, 0.0))
    groups = dict.fromkeys((fact.kind, fact.times) for fact in told)
    for kind, times in groups:
        chosen_N = np.array([(fact.kind, fact.times) == (kind, times) for fact in told])
        yield {"kind": kind, "times": times, "facts": int(chosen_N.sum()),
               "recalled": int((losses_N[chosen_N] < RECALLED).sum()),
               "recalled_without_rows": int((without_N[chosen_N] < RECALLED).sum()),
               "answer_loss": float(losses_N[chosen_N].mean())}


def answer_losses(opened: Opened, told: Sequence[Fact], scale: float) -> np.ndarray:
    """Nats of each fact's answer, float32 [N]: lines of facts after one another, each told once."""
    losses = []
    for start in range(0, len(told), LINES):
        part = told[start : start + LINES]
        tokens_T = opened.tokens("\n" + "".join(fact.line for fact in part))
        assert len(tokens_T) == 1 + 4 * len(part), "a word that is not one token"
        # Filled up so that all sequences are of one shape; targets begin with the first key.
        filled_T = np.pad(tokens_T, (0, 1 + 4 * LINES - len(tokens_T)))
        losses.append(token_losses(opened, filled_T[None], scale)[0, 2::4][: len(part)])
    return np.concatenate(losses)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The share recalled, an arm a line and a column for each number of times; a part a kind."""
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        shares = _shares(rows, kind)
        times = sorted({row["times"] for row in rows})
        first = next(iter(shares))
        lines = [f"{kind + ' facts':<18}{'total':>10}{'held (95 %)':>20}{'against ' + first:>22}"
                 f"{'per 1,000':>11}" + "".join(f"{f'told {n}':>9}" for n in times)]
        for arm, own in shares.items():
            total = next(row["total_params"] for row in rows if _arm(row) == arm)
            by_seed = _held(rows, arm, kind)
            held = interval(by_seed.values())
            gap = paired(by_seed, _held(rows, first, kind)) if arm != first else None
            lines.append(f"{arm:<18}{total:>10,}{_whole(held):>20}{_whole(gap, '+'):>22}"
                         f"{1000 * held.mean / total:>11.3f}"
                         + "".join(f"{own[n].mean:>9.3f}" for n in times))
        parts.append("\n".join(lines))
    seeds = sorted({row["seed"] for row in rows})
    return "\n\n".join([*parts, f"seeds {json.dumps(seeds)[1:-1]}; held: facts recalled; per 1,000 "
                        "parameters of all"])


def _whole(each: Interval | None, sign: str = "") -> str:
    """An interval of facts, in whole ones."""
    if each is None:
        return ""
    form = f"{sign}.0f"
    ends = "" if each.low is None else f" ({each.low:{form}} to {each.high:{form}})"
    return f"{each.mean:{form}}{ends}"


def _arm(row: Mapping[str, Any]) -> str:
    return str(row["name"]).removesuffix(f"-seed{row['seed']}")


def _held(rows: Sequence[Mapping[str, Any]], arm: str, kind: str) -> dict[int, float]:
    """Facts recalled by each seed."""
    held: dict[int, float] = {}
    for row in rows:
        if (_arm(row), row["kind"]) == (arm, kind):
            held[row["seed"]] = held.get(row["seed"], 0) + row["recalled"]
    return held


def _shares(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, dict[int, Interval]]:
    """arm -> times -> the share recalled, over seeds."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["kind"] == kind:
            values.setdefault(_arm(row), {}).setdefault(row["times"], []).append(
                row["recalled"] / row["facts"])
    return {arm: {times: interval(own) for times, own in each.items()}
            for arm, each in values.items()}


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel a kind: the share recalled against the times told."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    drawn, axes = figures.panels(len(kinds))
    for each, kind in zip(axes, kinds, strict=True):
        for (arm, own), colour in zip(_shares(rows, kind).items(), COLOURS, strict=False):
            times = sorted(own)
            figures.points(each, times, [own[n] for n in times], colour)
            each.plot(times, [own[n].mean for n in times], color=colour, linewidth=1.2,
                      label=arm.replace("-", " "))
        figures.title(each, f"{kind} facts")
        each.set_xscale("log", base=2)
        each.set_xlabel("times that the fact was told")
        each.set_ylabel("share recalled (loss below ln 2)")
        each.legend(frameon=False, fontsize=8)
    return drawn
