"""A run that reads longer sequences than the run from which it begins: `engram-jax extend`.

It is a run like any other, begun by `training.start_from`; what is decided here is its config.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from engram_jax.config import RunConfig, YarnConfig, require
from engram_jax.errors import UserError
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import changed, with_settings

SHARE = 10  # of the other run's steps, one in so many: 5,000 of the paper's 50,000
# What `extend` alone decides.
OWN = ("data.sequence_length", "data.tokenizer", "training.start_from", "training.start_optimizer")


def extended(
    directory: epath.PathLike, length: int, step: int | None = None, optimizer: bool = False,
    settings: Sequence[str] = (),
) -> RunConfig:
    """The run that goes on with another run's weights and tables at a longer sequence length.

    It reads the other run's text with its tokenizer, as many tokens a step, for a tenth of its
    steps, and YaRN stretches the positions by length / the length of the first training. All of
    that can be changed.

    Args:
      directory: of the other run.
      length: tokens of a sequence, above the other run's.
      step: of the checkpoint to begin from; None is the newest.
      optimizer: take its moments and its step over, too; the steps come on top of the other run's.
      settings: "field=value", applied last.

    Raises:
      UserError: no run, a length that is none longer, settings that do not fit.
    """
    records = RunDirectory(directory)
    other = records.config()
    require(length > other.data.sequence_length, "length", length,
            f"must be above the {other.data.sequence_length} tokens that {other.name} reads")
    name = str(records.path) if step is None else f"{records.path}@{step}"
    more = max(1, other.training.steps // SHARE)
    started = changed(other, {
        "name": f"{other.name}-{length}", "data.sequence_length": length,
        "data.batch_size": max(1, other.data.batch_size * other.data.sequence_length // length),
        **({"data.tokenizer": str(records.tokenizer_path)}
           if records.tokenizer_path.exists() else {}),
        "model.attention.yarn": _yarn(other, length),
        "training.steps": more + optimizer * other.training.steps, "training.freeze": "",
        "training.start_from": name, "training.start_optimizer": optimizer})
    run = with_settings(started, settings)
    for field in OWN:
        before, now = _value(started, field), _value(run, field)
        require(now == before, field, now, f"is decided by extend, which has {before!r}; leave it "
                "out of --set")
    _check_reach(run)
    return run


def _yarn(other: RunConfig, length: int) -> YarnConfig:
    """YaRN of the other run, or of the defaults, that reaches `length`."""
    theirs = other.model.attention.yarn
    if theirs is None:
        return YarnConfig(factor=length / other.data.sequence_length,
                          original_length=other.data.sequence_length)
    return dataclasses.replace(theirs, factor=max(theirs.factor, length / theirs.original_length))


def _check_reach(run: RunConfig) -> None:
    """Refuse a YaRN factor that does not reach the sequences that are read."""
    yarn, length = run.model.attention.yarn, run.data.sequence_length
    if yarn is not None and yarn.factor * yarn.original_length < length:
        raise UserError(
            f"model.attention.yarn.factor = {yarn.factor!r}: reaches "
            f"{int(yarn.factor * yarn.original_length)} tokens from {yarn.original_length}, and "
            f"the length is {length}; it must be at least {length / yarn.original_length:g}")


def _value(run: RunConfig, field: str) -> Any:
    part, _, name = field.partition(".")
    return getattr(getattr(run, part), name)
