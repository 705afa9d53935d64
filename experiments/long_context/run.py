"""Train the arms, extend them to eight times their length, ask for needles, and write results.csv.

    python -m experiments.long_context.run FOLDER [SEED ...]

FOLDER gets the texts, a folder a run, a file a seed, and results.csv once all seeds are there. What
is finished is not done again; seeds may be done by several processes at once. Of Engram two
checkpoints are extended, as in the paper: the last one, and the one whose validation loss is
nearest to that of the last one of experts alone.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import RunConfig, require
from engram_jax.costs.accounting import account
from engram_jax.errors import MachineError, UserError
from engram_jax.evaluation.scoring import Scorer
from engram_jax.inference.serving import Served, served
from engram_jax.results.equal_loss import evaluated_checkpoints
from engram_jax.runs.directory import RunDirectory, git_revision
from engram_jax.runs.extending import extended
from engram_jax.runs.train import train
from engram_jax.settings import changed
from engram_jax.sweeps.compilations import kept_compilations
from engram_jax.sweeps.sweep import from_csv, seeded, to_csv
from experiments.long_context import arms, language

SEEDS = (0, 1, 2)
LENGTHS = (64, 128, 256, 512)
QUESTIONS = 128  # of each kind and length

Row = dict[str, Any]
Say = Callable[[str], None]


def run_all(folder: Path, seeds: Sequence[int] = SEEDS, say: Say = print) -> None:
    """Train, extend and ask; results.csv of all seeds that are done."""
    if not (folder / language.TOKENIZER).exists():
        language.write(folder)
    with kept_compilations():
        for seed in seeds:
            if not _file(folder, seed).exists():
                rows = list(_of_seed(folder, seed, say))
                _file(folder, seed).write_text(to_csv(rows))
    done = [from_csv(_file(folder, seed).read_text()) for seed in SEEDS
            if _file(folder, seed).exists()]
    (folder / "results.csv").write_text(to_csv([row for rows in done for row in rows]))


def _file(folder: Path, seed: int) -> Path:
    return folder / f"seed{seed}.csv"


def _of_seed(folder: Path, seed: int, say: Say) -> Iterator[Row]:
    last = {}
    for run in seeded(arms.bases(str(folder)).values(), [seed]):
        train(run, folder / run.name, say)
        last[run.name.removesuffix(f"-seed{seed}")] = run
    for arm, (base, step) in _checkpoints(folder, last).items():
        yield from _of_checkpoint(folder, arm, base, step, say)


def _checkpoints(
    folder: Path, last: dict[str, RunConfig]
) -> dict[str, tuple[RunConfig, int]]:
    """Which checkpoints are extended: by arm the run and the step."""
    experts, engram = last["experts"], last["engram"]
    losses = evaluated_checkpoints(RunDirectory(folder / engram.name))
    wanted = evaluated_checkpoints(RunDirectory(folder / experts.name))[experts.training.steps]
    step = min(losses, key=lambda each: (abs(losses[each] - wanted), each))
    return {"experts": (experts, experts.training.steps), "engram-equal-loss": (engram, step),
            "engram": (engram, engram.training.steps)}


def _of_checkpoint(
    folder: Path, arm: str, base: RunConfig, step: int, say: Say
) -> Iterator[Row]:
    """Needles before the extension, with positions stretched alone, and after it."""
    longer = changed(
        extended(folder / base.name, language.LONG.length, step,
                 settings=arms.extension(str(folder))),
        {"name": f"{base.name}-from{step}", "data.seed": base.data.seed})
    result = train(longer, folder / longer.name, say)
    losses = evaluated_checkpoints(RunDirectory(folder / base.name))
    told = {"seed": base.training.seed, "arm": arm, "step": step, "loss": losses[step],
            "long_loss": result["loss"], "total_params": account(base).total_params,
            "memory_params": account(base).engram_params,
            "flops_per_token": account(base).flops_per_token}
    first = served(RunDirectory(folder / base.name), step=step)
    last = served(RunDirectory(folder / longer.name))
    stretched = dataclasses.replace(first, run=changed(
        first.run, {"model.attention.yarn": longer.model.attention.yarn}))
    for stage, model in (("before", first), ("stretched", stretched), ("after", last)):
        for asked in answered(model):
            yield {**told, "stage": stage, **asked}
    say(f"{longer.name}: asked")


def answered(model: Served) -> Iterator[Row]:
    """The share of right answers by kind of needle and length, and their mean loss in nats."""
    scorer = Scorer(model, 16)
    for kind, needles in language.KINDS.items():
        for length in LENGTHS:
            tokens_NT, answers_NT = language.needles(needles, length, QUESTIONS)
            losses_NT, greedy_NT = scorer(tokens_NT[:, :-1], tokens_NT[:, 1:])
            chosen_NT = answers_NT[:, 1:]
            yield {"kind": kind, "length": length, "answers": int(chosen_NT.sum()),
                   "right": float(greedy_NT[chosen_NT].mean()),
                   "answer_loss": float(np.asarray(losses_NT)[chosen_NT].mean())}


def main(words: Sequence[str]) -> int:
    """Run the experiment in the folder that the command line names."""
    if not words or not all(word.isdecimal() for word in words[1:]):
        print("python -m experiments.long_context.run FOLDER [SEED ...]", file=sys.stderr)
        return 2
    try:
        require(not git_revision().endswith("+changes"), "git", "uncommitted changes",
                "nobody could run this again; commit them")
        run_all(Path(words[0]), [int(word) for word in words[1:]] or SEEDS)
    except (UserError, MachineError) as error:
        print(f"experiments.long_context.run: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
