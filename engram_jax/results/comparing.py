"""Any runs side by side: what differs in their configs, what they cost, and what came out.

Runs that differ in nothing but their seeds and names are one arm. One arm is the baseline that the
others are measured against.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from engram_jax.config import RunConfig, require
from engram_jax.costs.accounting import Account, account, short
from engram_jax.errors import UserError
from engram_jax.results.statistics import Interval, bootstrap, differences, interval
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
      diverged: the last step that it logged had numbers that were not finite.
    """

    path: epath.Path
    config: RunConfig
    fields: Mapping[str, Any]
    result: Mapping[str, Any] | None
    step: int
    diverged: bool

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
        values = self.values(name)
        return interval(values.values()) if values else None

    def gaps(self, other: "Arm") -> list[float]:
        """The loss less the other's at equal seeds; none without any, or on another text."""
        if other is self or self.fields[TEXT] != other.fields[TEXT]:
            return []
        return differences(self.values("loss"), other.values("loss"))

    def against(self, other: "Arm") -> Interval | None:
        """The interval of `gaps`; None without any."""
        gaps = self.gaps(other)
        return interval(gaps) if gaps else None

    def differing(self, other: "Arm") -> list[str]:
        """The fields in which the two differ; one that only one of them has is one."""
        return [name for name in dict.fromkeys([*self.fields, *other.fields])
                if repr(self.fields.get(name)) != repr(other.fields.get(name))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms, and the one of them that the others are measured against."""

    arms: Sequence[Arm]
    baseline: Arm


def comparison(
    directories: Sequence[epath.PathLike], baseline: str = "", axes: Sequence[str] = ()
) -> Comparison:
    """The arms of all runs in `directories`, if they may be compared.

    Args:
      directories: run directories or folders of such.
      baseline: the name of the arm to measure against, by default the first.
      axes: the fields, or parts of the config, that the arms may differ from the baseline in; none
        are all.

    Raises:
      UserError: a folder that holds no run, no such arm or field, a run that diverged, or an arm
        that differs from the baseline in more than the axes.
      MachineError: something cannot be read.
    """
    compared = arms(directories)
    _check_finite(compared)
    named = [arm for arm in compared if arm.name == baseline] or ([] if baseline else compared[:1])
    require(bool(named), "baseline", baseline,
            f"no such arm; there are {', '.join(arm.name for arm in compared)}")
    if axes:
        _check_axes(compared, named[0], axes)
    return Comparison(arms=compared, baseline=named[0])


def _check_finite(compared: Sequence[Arm]) -> None:
    lost = [str(run.path) for arm in compared for run in arm.runs if run.diverged]
    if lost:
        raise UserError(f"{', '.join(lost)}: diverged (the last logged step is not finite), and a "
                        "mean over the other seeds would be one of the lucky; leave the arm out")


def _check_axes(compared: Sequence[Arm], baseline: Arm, axes: Sequence[str]) -> None:
    known = {name for arm in compared for name in arm.fields}
    for axis in axes:
        require(axis in known, "axis", axis, "is no field of these runs")
    for arm in compared:
        more = [name for name in arm.differing(baseline)
                if not any(name == axis or name.startswith(f"{axis}.") for axis in axes)]
        values = "; ".join(f"{name}: {_value(baseline, name)} and {_value(arm, name)}"
                           for name in more)
        require(not more, "axis", ", ".join(axes),
                f"{arm.name} differs from {baseline.name} in more than that ({values})")


def _value(arm: Arm, name: str) -> str:
    """A field's value as a table shows it; - where the arm has no such field."""
    return word(arm.fields[name]) if name in arm.fields else "-"


def arms(directories: Sequence[epath.PathLike]) -> list[Arm]:
    """The arms of all runs that are in `directories`, run directories or folders of such.

    Raises:
      UserError: a folder that holds no run.
      MachineError: something cannot be read.
    """
    folders = [path for directory in directories for path in _run_folders(epath.Path(directory))]
    grouped: dict[tuple[str, int], list[Run]] = {}
    met: collections.Counter[tuple[str, Seed]] = collections.Counter()
    for path in dict.fromkeys(folders):
        run = _read(RunDirectory(path))
        key = repr(sorted(run.fields.items()))
        # The same run in two folders is not two seeds.
        grouped.setdefault((key, met[key, run.seed]), []).append(run)
        met[key, run.seed] += 1
    names = [_name(runs[0]) for runs in grouped.values()]
    return [Arm(name=name if names.count(name) == 1 else str(runs[0].path), runs=runs)
            for name, runs in zip(names, grouped.values(), strict=True)]


def _run_folders(directory: epath.Path) -> list[epath.Path]:
    path = RunDirectory(directory).path
    with refusals(path, "read"):
        if (path / "config.json").exists():
            return [path]
        inner = sorted(path.iterdir()) if path.is_dir() else []
        folders = [folder for folder in inner if (folder / "config.json").exists()]
    if not folders:
        raise UserError(f"{path}: holds no run (there is no config.json in it or in its folders)")
    return folders


def _read(records: RunDirectory) -> Run:
    config, result = records.config(), records.result()
    fields = dict(_flat(to_dict(config)))
    for name in ("name", *SEEDS):
        del fields[name]
    env = records.env()
    rows = records.metrics() if result is None else []
    return Run(path=records.path, config=config, result=result,
               fields={**fields, TEXT: str(env.get("data_fingerprint", ""))[:8]},
               step=max((row["step"] for row in rows), default=0),
               diverged=any(bool(row.get("not_finite")) for row in rows[-1:]))


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


def differing(compared: Sequence[Arm]) -> list[str]:
    """The fields in which the arms that have them differ."""
    names = dict.fromkeys(name for arm in compared for name in arm.fields)
    return [name for name in names
            if len({repr(arm.fields[name]) for arm in compared if name in arm.fields}) > 1]


def to_json(compared: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values; intervals as `statistics.Interval`, null where there is
    none."""
    names = differing(compared.arms)
    return {"fields": names, "baseline": compared.baseline.name, "arms": [{
        "name": arm.name,
        "fields": {name: arm.fields.get(name) for name in names},
        "total_params": arm.numbers.total_params,
        "active_params": arm.numbers.active_params,
        "memory_params": arm.numbers.engram_params,
        "loss": _plain(arm.mean("loss")),
        "loss_against_baseline": _plain(arm.against(compared.baseline)),
        "loss_against_baseline_bootstrap": _plain(bootstrap(gaps) if gaps else None),
        "bits_per_byte": _plain(arm.mean("bits_per_byte")),
        "tokens_per_s": _plain(arm.mean("tokens_per_s")),
        "runs": [str(run.path) for run in arm.runs],
        "unfinished": [{"run": str(run.path), "step": run.step, "steps": run.config.training.steps}
                       for run in arm.unfinished],
    } for arm in compared.arms for gaps in [arm.gaps(compared.baseline)]]}


def _plain(value: Interval | None) -> dict[str, Any] | None:
    return dataclasses.asdict(value) if value else None


def described(compared: Comparison) -> str:
    """The comparison as a table for people: an arm a line, then the runs that are not done."""
    names, baseline = differing(compared.arms), compared.baseline
    head = ["run", *headings(names), "seeds", "total", "active", "memory", "loss (95 %)",
            f"against {baseline.name} (t)", "(bootstrap)", "bits/byte", "tokens/s"]
    rows = [head, *([
        arm.name,
        *(_value(arm, name) for name in names),
        str(len(arm.values("loss"))),
        short(arm.numbers.total_params), short(arm.numbers.active_params),
        short(arm.numbers.engram_params),
        *_outcome(arm, baseline),
    ] for arm in compared.arms)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]),
                        *(word.rjust(width) for word, width in zip(row[1:], widths[1:],
                                                                   strict=True))])
             for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, *(
        f"{run.path}: step {run.step} of {run.config.training.steps}, not done"
        for arm in compared.arms for run in arm.unfinished)])


def headings(names: Sequence[str]) -> list[str]:
    """The last word of each field's name; all of it where two end alike."""
    ends = [name.rpartition(".")[2] for name in names]
    return [end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)]


def _outcome(arm: Arm, baseline: Arm) -> tuple[str, str, str, str, str]:
    loss, bits, speed = (arm.mean(name) for name in ("loss", "bits_per_byte", "tokens_per_s"))
    if loss is None or bits is None or speed is None:
        return "-", "-", "-", "-", "-"
    gaps = arm.gaps(baseline)
    told = (interval(gaps).signed(), _ends(bootstrap(gaps))) if gaps else ("-", "-")
    return str(loss), *told, f"{bits.mean:.4f}", f"{speed.mean:,.0f}"


def _ends(value: Interval) -> str:
    """The interval alone; - for one seed, which has none."""
    if value.low is None or value.high is None:
        return "-"
    return f"({value.low:+.4f} to {value.high:+.4f})"


def word(value: Any) -> str:
    """A field's value as a table shows it."""
    if isinstance(value, list):
        return ",".join(map(word, value))
    return "none" if value is None else str(value)
