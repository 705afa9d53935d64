"""A run that begins from another run's checkpoint (`training.start_from`).

Weights and tables are the other run's. With `training.start_optimizer` so are the moments, the
step and, where both read the same data alike, the place in it: the run is the other one, extended.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import grain
from jax.sharding import Mesh

from engram_jax import distributed
from engram_jax.config import RunConfig, require
from engram_jax.errors import MachineError, UserError
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.digests import damage
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import Inputs
from engram_jax.training import placement
from engram_jax.training.state import TrainState

WEIGHTS = ("params", "router_bias", "tables")
ORDER = ("sequence_length", "batch_size", "validation_fraction", "seed")  # of one text's sequences
MOMENTS = ("opt_state", "table_state", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """How a run begins.

    Attributes:
      state: before its first step.
      step: that of the state.
      source: what env.json says of where it came from.
    """

    state: TrainState
    step: int
    source: Mapping[str, Any]


def begin_from(
    run: RunConfig, inputs: Inputs, mesh: Mesh, first: TrainState,
    batches: grain.DatasetIterator[Any], known: Mapping[str, Any], say: Callable[[str], None],
) -> Beginning:
    """The state of the run that `training.start_from` names, as the first one of this run.

    Args:
      run: that begins.
      inputs: of it.
      mesh: that its state lies on.
      first: its state without another run, whose moments it keeps if it takes none over.
      batches: its iterator; wound where the other run read the same data.
      known: what env.json said at an earlier start, so that it begins from the same checkpoint.
      say: gets lines for people.

    Raises:
      UserError: no such run or checkpoint, or one of another tokenizer, hash, shape or dtype.
      MachineError: the checkpoint is damaged.
    """
    name, step = parsed(run.training.start_from)
    source = RunDirectory(name)
    their_run = source.config()
    whole = run.training.start_optimizer
    alike = whole and _same_data(run, their_run, inputs, source.env())
    with Checkpoints(source.checkpoints, 1, inputs.fingerprints()) as checkpoints:
        step = distributed.from_first("the checkpoint to begin from", lambda: _chosen(
            run, checkpoints, known.get("step", step)))
        lines = distributed.from_first("its digests",
                                       lambda: damage(source.checkpoints / str(step)))
        if lines:
            raise MachineError(f"training.start_from = {run.training.start_from!r}: {lines[0]}")
        fields = WEIGHTS + MOMENTS if whole else WEIGHTS
        try:
            saved = checkpoints.restore(placement.placed_state(run, mesh),
                                        batches if alike else None, step, only=fields)
        except UserError as error:
            name = f"training.start_from = {run.training.start_from!r}"
            raise UserError(f"{name}: {error}") from error
        saved_ns = checkpoints.saved_ns(step)
    state = first.replace(**{name: getattr(saved, name) for name in fields})  # type: ignore[attr-defined]
    begin = step if whole else 0
    require(run.training.steps > begin, "training.steps", run.training.steps,
            f"must be above {begin}, the step of training.start_from")
    data = "and its place in the data" if alike else "data from its beginning"
    say(f"{run.name}: begins from step {step} of {source.path}"
        + (f", with its optimizer {data}" if whole else ""))
    return Beginning(state=state, step=begin, source={
        "run": str(source.path), "name": their_run.name, "step": step, "saved_ns": saved_ns,
        "optimizer": whole, "data": alike})


def kept_artifact(run: RunConfig, records: RunDirectory) -> HashArtifact | None:
    """What a run hashes with: as it keeps it, or as the run that it begins from does.

    None where neither keeps it, so that it is derived.

    Raises:
      UserError: a file that is none or altered, or of another model than the run's.
    """
    own = records.artifact()
    if own is not None or not run.training.start_from:
        return own
    theirs = RunDirectory(parsed(run.training.start_from)[0]).artifact()
    try:
        if theirs is not None:
            theirs.addressing(run.model)
    except UserError as error:
        raise UserError(f"training.start_from = {run.training.start_from!r}: {error}") from error
    return theirs


def parsed(text: str) -> tuple[str, int | None]:
    """The run and the step of RUN@STEP; None where only a run is named."""
    name, at, step = text.rpartition("@")
    return (name, int(step)) if at and step.isdecimal() else (text, None)


def _chosen(run: RunConfig, checkpoints: Checkpoints, step: int | None) -> int:
    """The step to begin from: the last one unless another is named."""
    steps = checkpoints.steps
    require(bool(steps), "training.start_from", run.training.start_from,
            "has no whole checkpoint")
    require(step is None or step in steps, "training.start_from", run.training.start_from,
            f"has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _same_data(run: RunConfig, other: RunConfig, inputs: Inputs, env: Mapping[str, Any]) -> bool:
    """Whether both read the same sequences in the same order."""
    return (all(getattr(run.data, field) == getattr(other.data, field) for field in ORDER)
            and env.get("data_fingerprint") == inputs.tokens.fingerprint)
