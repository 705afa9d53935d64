"""Any runs side by side: what differs in their configs, what they cost, and what came out.

Runs that differ in nothing but their seeds and names are one arm.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from engram_jax.config import RunConfig
from engram_jax.costs.accounting import Account, account, short
from engram_jax.errors import UserError
from engram_jax.results.statistics import Interval, interval, paired
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import to_dict
from engram_jax.storage import refusals

SEEDS = ("data.seed", "training.seed")
TEXT = "text"  # the fingerprint of what was read, from env.json; the rest are fields of the config

Seed = tuple[int, int]  # of the data, of the training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory.

    Attributes:
      fields: the config's values by dotted name, less name and seeds, and the text's fingerprint.
      result: result.json; None while the run is not done.
      step: the last that was logged.
    """

    path: epath.Path
    config: RunConfig
    fields: Mapping[str, Any]
    result: Mapping[str, Any] | None
    step: int

    @property
    def seed(self) -> Seed:
        return self.config.data.seed, self.config.training.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in their seeds alone, one a seed."""

    name: str
    runs: Sequence[Run]

    @property
    def fields(self) -> Mapping[str, Any]:
        return self.runs[0].fields

    @property
    def numbers(self) -> Account:
        return account(self.runs[0].config)

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if run.result is None]

    def values(self, name: str) -> dict[Seed, float]:
        """A number of result.json of each finished run."""
        return {run.seed: run.result[name] for run in self.runs if run.result is not None}

    def mean(self, name: str) -> Interval | None:
        """The interval over seeds of a number of result.json; None if no run is done."""
        found = self.values(name)
        return interval(found.values()) if found else None

    def against(self, other: "Arm") -> Interval | None:
        """The loss less the other's at equal seeds; None without any, or on another text."""
        if other is self or self.fields[TEXT] != other.fields[TEXT]:
            return None
        return paired(self.values("loss"), other.values("loss"))


def arms(directories: Sequence[epath.PathLike]) -> list[Arm]:
    """The arms of all runs that are in `directories`, run directories or folders of such.

    Raises:
      UserError: a folder that holds no run.
      MachineError: something cannot be read.
    """
    places = [place for directory in directories for place in _run_folders(epath.Path(directory))]
    grouped: dict[tuple[str, int], list[Run]] = {}
    met: collections.Counter[tuple[str, Seed]] = collections.Counter()
    for place in dict.fromkeys(places):
        run = _read(RunDirectory(place))
        key = repr(sorted(run.fields.items()))
        # The same run in two folders is not two seeds.
        grouped.setdefault((key, met[key, run.seed]), []).append(run)
        met[key, run.seed] += 1
    names = [_name(runs[0]) for runs in grouped.values()]
    return [Arm(name=name if names.count(name) == 1 else str(runs[0].path), runs=runs)
            for name, runs in zip(names, grouped.values(), strict=True)]


def _run_folders(directory: epath.Path) -> list[epath.Path]:
    place = RunDirectory(directory).path
    with refusals(place, "read"):
        if (place / "config.json").exists():
            return [place]
        inner = sorted(place.iterdir()) if place.is_dir() else []
        found = [folder for folder in inner if (folder / "config.json").exists()]
    if not found:
        raise UserError(f"{place}: holds no run (there is no config.json in it or in its folders)")
    return found


def _read(records: RunDirectory) -> Run:
    config, result = records.config(), records.result()
    fields = dict(_flat(to_dict(config)))
    for name in ("name", *SEEDS):
        del fields[name]
    env = records.env()
    rows = records.metrics() if result is None else []
    return Run(path=records.path, config=config, result=result,
               fields={**fields, TEXT: str(env.get("data_fingerprint", ""))[:8]},
               step=max((row["step"] for row in rows), default=0))


def _flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted name; a part of the config that may be missing is a leaf, too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield where + name, "set"
            yield from _flat(value, f"{where}{name}.")
        else:
            yield where + name, value


def _name(run: Run) -> str:
    return run.config.name.removesuffix(f"-seed{run.config.training.seed}")


def differing(found: Sequence[Arm]) -> list[str]:
    """The fields in which the arms that have them differ."""
    names = dict.fromkeys(name for arm in found for name in arm.fields)
    return [name for name in names
            if len({repr(arm.fields[name]) for arm in found if name in arm.fields}) > 1]


def to_json(found: Sequence[Arm]) -> dict[str, Any]:
    """The comparison as plain JSON values; intervals as `statistics.Interval`, null where there is
    none."""
    names = differing(found)
    return {"fields": names, "arms": [{
        "name": arm.name,
        "fields": {name: arm.fields.get(name) for name in names},
        "total_params": arm.numbers.total_params,
        "active_params": arm.numbers.active_params,
        "memory_params": arm.numbers.engram_params,
        "loss": _plain(arm.mean("loss")),
        "loss_against_first": _plain(arm.against(found[0])),
        "bits_per_byte": _plain(arm.mean("bits_per_byte")),
        "tokens_per_s": _plain(arm.mean("tokens_per_s")),
        "runs": [str(run.path) for run in arm.runs],
        "unfinished": [{"run": str(run.path), "step": run.step, "steps": run.config.training.steps}
                       for run in arm.unfinished],
    } for arm in found]}


def _plain(value: Interval | None) -> dict[str, Any] | None:
    return dataclasses.asdict(value) if value else None


def described(found: Sequence[Arm]) -> str:
    """The comparison as a table for people: an arm a line, then the runs that are not done."""
    names = differing(found)
    head = ["run", *headings(names), "seeds", "total", "active", "memory", "loss (95 %)",
            "against the first", "bits/byte", "tokens/s"]
    rows = [head, *([
        arm.name,
        *(word(arm.fields[name]) if name in arm.fields else "-" for name in names),
        str(len(arm.values("loss"))),
        short(arm.numbers.total_params), short(arm.numbers.active_params),
        short(arm.numbers.engram_params),
        *_outcome(arm, found[0]),
    ] for arm in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]),
                        *(word.rjust(width) for word, width in zip(row[1:], widths[1:],
                                                                   strict=True))])
             for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, *(
        f"{run.path}: step {run.step} of {run.config.training.steps}, not done"
        for arm in found for run in arm.unfinished)])


def headings(names: Sequence[str]) -> list[str]:
    """The last word of each field's name; all of it where two end alike."""
    ends = [name.rpartition(".")[2] for name in names]
    return [end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)]


def _outcome(arm: Arm, first: Arm) -> tuple[str, str, str, str]:
    loss, bits, speed = (arm.mean(name) for name in ("loss", "bits_per_byte", "tokens_per_s"))
    if loss is None or bits is None or speed is None:
        return "-", "-", "-", "-"
    gap = arm.against(first)
    return str(loss), gap.signed() if gap else "-", f"{bits.mean:.4f}", f"{speed.mean:,.0f}"


def word(value: Any) -> str:
    """A field's value as a table shows it."""
    if isinstance(value, list):
        return ",".join(map(word, value))
    return "none" if value is None else str(value)
