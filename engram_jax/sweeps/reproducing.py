"""Train a finished run again from its own record, and compare what both logged, to the bit.

On the same kind of devices, with the same versions and the same mesh, every logged number but the
timings is the same. Where one is not, the first that differs is named, and what differs between
the two environments.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from engram_jax.config import RunConfig, require
from engram_jax.errors import UserError
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import open_inputs
from engram_jax.runs.train import train
from engram_jax.settings import changed, with_settings
from engram_jax.training.placement import chosen_mesh

TIMINGS = "perf/"  # what their names begin with
FOLDER = "reproduction"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The first logged number that is not the same: at `step`, `before` in the run's own record."""

    step: int
    name: str
    before: float | None
    now: float | None

    def __str__(self) -> str:
        before, now = ("not logged" if value is None else repr(value)
                       for value in (self.before, self.now))
        return f"step {self.step}: {self.name} was {before} and is {now}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Two trainings of one run, compared.

    Attributes:
      steps: logged steps that were compared.
      difference: None where every number is the same.
      loss_before, loss: on the validation text, nats a token.
      environment: what differs, "name: before, now".
    """

    steps: int
    difference: Difference | None
    loss_before: float
    loss: float
    environment: Sequence[str]

    @property
    def same(self) -> bool:
        return self.difference is None and self.loss == self.loss_before

    def __str__(self) -> str:
        if self.same:
            lines = [f"the same to the bit: {self.steps} logged steps and the validation loss "
                     f"{self.loss!r}"]
        else:
            first = self.difference or "no logged step"
            lines = [f"not the same; the first difference: {first}",
                     f"validation loss was {self.loss_before!r} and is {self.loss!r}"]
        return "\n".join([*lines, *(f"environment: {line}" for line in self.environment)])


def reproduce(
    directory: epath.PathLike, out: epath.PathLike | None = None,
    say: Callable[[str], None] = print, mesh: str | None = None,
) -> Reproduction:
    """Train the run in `directory` again and compare.

    Args:
      directory: of a finished run.
      out: gets the second run, default `directory`/reproduction. One that was stopped there goes
        on; one that is done is compared as it is.
      say: gets lines for people.
      mesh: "DATAxFSDP"; by default the recorded one.

    Raises:
      UserError: the run is not done, its text has changed, or there are too few devices.
      MachineError: something cannot be read or written.
    """
    records = RunDirectory(directory)
    run, before, env = records.config(), records.result(), records.env()
    if before is None:
        raise UserError(f"{records.path}: is not done; the command that began it goes on, and then "
                        "there is something to reproduce")
    again = RunDirectory(records.path / FOLDER if out is None else out)
    require(again.path != records.path, "out", str(again.path), "is the run's own folder; choose "
            "another one")
    run = _with_what_it_chose(with_settings(run, [f"data.tokenizer={records.tokenizer_path}"]), env)
    _check_text(run, records, env)
    if (kept := records.artifact()) is not None:
        again.keep_artifact(kept)
    result = train(run, again.path, say, chosen_mesh(mesh or env.get("mesh")))
    steps, difference = compared(records.metrics(), again.metrics())
    return Reproduction(
        steps=steps, difference=difference, loss_before=before["loss"], loss=result["loss"],
        environment=differences(env, again.env()))


def _with_what_it_chose(run: RunConfig, env: Mapping[str, Any]) -> RunConfig:
    """The run in as many parts as it was trained in, whatever would fit these devices."""
    chosen = {"training.accumulate": "accumulate", "model.remat": "remat"}
    return changed(run, {field: env[name] for field, name in chosen.items() if name in env})


def _check_text(run: RunConfig, records: RunDirectory, env: Mapping[str, Any]) -> None:
    tokens = open_inputs(run).tokens
    require(tokens.fingerprint == env.get("data_fingerprint"), "data.path", run.data.path,
            f"is no longer the text that the run in {records.path} was trained on")
    require(tokens.tokenizer_digest == env.get("tokenizer_digest"), "data.tokenizer",
            run.data.tokenizer, "is not the tokenizer that the run was trained with")


Rows = Sequence[Mapping[str, Any]]


def compared(before: Rows, now: Rows) -> tuple[int, Difference | None]:
    """How many logged steps there are in both, and the first number that differs.

    A number that only one of the two has is a difference; timings are left out.
    """
    ours, theirs = _by_step(before), _by_step(now)
    for step in sorted(ours.keys() | theirs.keys()):
        old, new = ours.get(step, {}), theirs.get(step, {})
        for name in {**old, **new}:
            if not _same(old.get(name), new.get(name)):
                return len(ours.keys() & theirs.keys()), Difference(
                    step=step, name=name, before=old.get(name), now=new.get(name))
    return len(ours), None


def _by_step(rows: Rows) -> dict[int, dict[str, Any]]:
    """Training's and evaluation's numbers of each step together."""
    grouped: dict[int, dict[str, Any]] = {}
    for row in rows:
        grouped.setdefault(row["step"], {}).update(
            {name: value for name, value in row.items()
             if name != "step" and not name.startswith(TIMINGS)})
    return grouped


def _same(before: float | None, now: float | None) -> bool:
    if before is None or now is None:
        return before is now
    return before == now or (math.isnan(before) and math.isnan(now))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two env.json, "name: before, now" each, at their first starts."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{where}{name}.")
        elif old != new and name not in ("command", "starts", "tokens"):
            lines.append(f"{where}{name}: {_word(old)}, {_word(new)}")
    return lines


def _word(value: Any) -> str:
    if isinstance(value, list) and len(set(value)) == 1:
        return f"{len(value)} x {value[0]}"
    return "not recorded" if value is None else str(value)
