"""Runs at equal validation loss: of each the checkpoint whose loss is nearest.

Scores of the last checkpoints say how good models are, and not what one kind of model does better
than another that is as good; the paper compares at equal loss, too. Checkpoints are the runs' own,
with the losses that they had; nothing is interpolated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from engram_jax.config import require
from engram_jax.costs.accounting import account, short
from engram_jax.results import comparing
from engram_jax.results.comparing import Run, Seed
from engram_jax.results.scores import at_step, scores_of
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory

TOLERANCE = 0.01  # nats a token
# What a validation loss depends on beside the model.
SAME = (comparing.TEXT, "data.tokenizer", "data.sequence_length", "training.evaluate_batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A run, and its checkpoint of the loss that is asked for.

    Attributes:
      wanted: the loss that is asked for, nats a token.
      step, loss: of the checkpoint; None where none is near enough.
      nearest: the step and loss of the nearest, near enough or not; None without any.
      flops: of the training up to it.
      scores: of it, and of the runs that began from it, by name.
    """

    run: Run
    wanted: float
    step: int | None
    loss: float | None
    nearest: tuple[int, float] | None
    flops: int
    scores: Mapping[str, float]


def evaluated_checkpoints(records: RunDirectory) -> dict[int, float]:
    """The validation loss of each whole checkpoint that was evaluated, by step."""
    losses = {row["step"]: float(row["evaluation/loss"]) for row in records.metrics()
              if "evaluation/loss" in row}
    if not records.checkpoints.exists():
        return {}
    with Checkpoints(records.checkpoints, 1, {}) as checkpoints:
        return {step: losses[step] for step in checkpoints.steps if step in losses}


def at_equal_loss(
    directories: Sequence[epath.PathLike], loss: float | None = None, tolerance: float = TOLERANCE
) -> list[Choice]:
    """Of every run the checkpoint of equal validation loss.

    A run in `directories` that began from another of them is not chosen from: its scores are told
    with the checkpoint that it began from.

    Args:
      directories: as `comparing.arms` takes them.
      loss: that is asked for, nats a token; None is for each seed the lowest that all runs of it
        reach, the lowest of the run that does worst.
      tolerance: nats by which a checkpoint's loss may differ from that.

    Raises:
      UserError: a folder that holds no run, a run without a checkpoint that was evaluated, runs
        whose losses are of different texts, or a tolerance that is none.
    """
    require(0 <= tolerance < float("inf"), "tolerance", tolerance, "must not be negative")
    every = [run for arm in comparing.arms(directories) for run in arm.runs]
    begun = {str(run.path): RunDirectory(run.path).source() for run in every}
    chosen = [run for run in every if begun[str(run.path)].get("run") not in begun]
    _check_alike(chosen)
    losses = {str(run.path): evaluated_checkpoints(RunDirectory(run.path)) for run in chosen}
    for run in chosen:
        require(bool(losses[str(run.path)]), "run", str(run.path), "has no checkpoint whose "
                "validation loss is known; train it with training.evaluate_every and "
                "training.checkpoint_every alike, and keep_checkpoints large")
    wanted = {seed: loss if loss is not None else max(
        min(losses[str(run.path)].values()) for run in chosen if run.seed == seed)
        for seed in {run.seed for run in chosen}}
    return [_choice(run, wanted[run.seed], tolerance, losses[str(run.path)],
                    [other for other in every
                     if begun[str(other.path)].get("run") == str(run.path)], begun)
            for run in chosen]


def _check_alike(runs: Sequence[Run]) -> None:
    for run in runs:
        for name in SAME:
            ours, theirs = runs[0].fields[name], run.fields[name]
            require(ours == theirs, name, theirs, f"of {run.config.name} is not {ours!r} as that "
                    f"of {runs[0].config.name}, so their losses are of different texts")


def _choice(
    run: Run, wanted: float, tolerance: float, losses: Mapping[int, float],
    longer: Sequence[Run], begun: Mapping[str, Mapping[str, Any]],
) -> Choice:
    step, loss = min(losses.items(), key=lambda item: (abs(item[1] - wanted), item[0]))
    if abs(loss - wanted) > tolerance:
        return Choice(run=run, wanted=wanted, step=None, loss=None, nearest=(step, loss), flops=0,
                      scores={})
    data = run.config.data
    tokens = step * data.batch_size * data.sequence_length
    scores = at_step(scores_of(RunDirectory(run.path)), step)
    for other in longer:
        if begun[str(other.path)].get("step") == step:
            theirs = scores_of(RunDirectory(other.path))
            last = max((score.step for score in theirs), default=0)
            reads = f"{other.config.data.sequence_length:,}"
            scores |= {f"{name} (extended to {reads})": value
                       for name, value in at_step(theirs, last).items()}
    return Choice(run=run, wanted=wanted, step=step, loss=loss, nearest=(step, loss),
                  flops=tokens * account(run.config).flops_per_token, scores=scores)


def to_json(choices: Sequence[Choice], tolerance: float) -> dict[str, Any]:
    """The choices as plain JSON values; null where there is no checkpoint."""
    return {"tolerance": tolerance, "runs": [{
        "run": str(choice.run.path), "name": choice.run.config.name, "seed": _seed(choice.run.seed),
        "wanted_loss": choice.wanted, "step": choice.step, "loss": choice.loss,
        "nearest": choice.nearest and {"step": choice.nearest[0], "loss": choice.nearest[1]},
        "flops": choice.flops if choice.step is not None else None, "scores": dict(choice.scores),
    } for choice in choices]}


def _seed(seed: Seed) -> dict[str, int]:
    return {"data": seed[0], "training": seed[1]}


def described(choices: Sequence[Choice], tolerance: float) -> str:
    """A run a line with its checkpoint, then the scores, then the runs that have none."""
    names = list(dict.fromkeys(name for choice in choices for name in choice.scores))
    head = ["run", "step", "of", "FLOPs", "loss", "wanted", *names]
    rows = [head, *(_row(choice, names) for choice in choices if choice.step is not None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(
        word.rjust(width) for word, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += [f"{choice.run.config.name}: no checkpoint within {tolerance:g} nats of "
              f"{choice.wanted:.4f}; the nearest is of step {choice.nearest[0]}, loss "
              f"{choice.nearest[1]:.4f}"
              for choice in choices if choice.step is None and choice.nearest]
    return "\n".join(lines)


def _row(choice: Choice, names: Sequence[str]) -> list[str]:
    assert choice.loss is not None
    return [choice.run.config.name, f"{choice.step:,}", f"{choice.run.config.training.steps:,}",
            short(choice.flops), f"{choice.loss:.4f}", f"{choice.wanted:.4f}",
            *(f"{choice.scores[name]:.4g}" if name in choice.scores else "-" for name in names)]
