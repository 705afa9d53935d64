"""A sweep: an experiment's runs at one scale, over seeds, trained and set side by side.

An experiment is a folder `experiments/NAME` with `configs.py`, whose `runs(scale, seeds)` gives
the runs and whose `SCALES` says at which scales there are any, and `report.py` with
`table(results)`, `figure(results)` and `FIGURE`, the figure's file. One that asks more of its runs
than their losses has `measured(results, folder)`, too, whose rows take the results' place. Finished
runs are skipped, interrupted ones go on.
"""

import contextlib
import csv
import dataclasses
import fnmatch
import importlib
import importlib.util
import io
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from etils import epath
from jax.sharding import Mesh

from engram_jax import distributed
from engram_jax.config import RunConfig, require
from engram_jax.costs import forecast
from engram_jax.errors import UserError
from engram_jax.results.arms import Result, diverged
from engram_jax.results.figures import save
from engram_jax.runs.directory import git_revision
from engram_jax.settings import changed, first_difference, json_text, with_settings
from engram_jax.storage import refusals, write_text
from engram_jax.sweeps.launchers import Launcher, local, share
from engram_jax.sweeps.member import result_before

SEEDS = (0, 1, 2)

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep is.

    Attributes:
      experiment: its folder's name.
      scale: one of the experiment's `SCALES`.
      seeds: each gives every arm the same start where shapes agree, and the same order of the text.
      settings: "field=value", applied to every run.

    Raises (when built):
      UserError: no such experiment or scale, or seeds that are no seeds.
    """

    experiment: str
    scale: str = "tiny"
    seeds: tuple[int, ...] = SEEDS
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.experiment in (names := experiments()), "experiment", self.experiment,
                f"no such experiment; there are {', '.join(names)}")
        scales = _module(self.experiment, "configs").SCALES
        require(self.scale in scales, "scale", self.scale,
                f"{self.experiment} has {', '.join(scales)}")
        require(bool(self.seeds) and min(self.seeds) >= 0, "seeds", list(self.seeds),
                "must be one or more whole numbers, none negative")
        repeated = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        require(not repeated, "seeds", list(self.seeds),
                f"has {', '.join(map(str, repeated))} more than once, which would count one run as "
                "several")

    def runs(self, match: str = "*") -> list[RunConfig]:
        """The runs whose names match a pattern of the shell's, seed after seed.

        Raises:
          UserError: two runs of one name, or none that matches.
        """
        arms = _module(self.experiment, "configs").runs(self.scale, self.seeds)
        runs = [with_settings(run, self.settings) for run in arms]
        names = [run.name for run in runs]
        require(len(set(names)) == len(names), "name", names, "every run of a sweep needs its own")
        matching = [run for run in runs if fnmatch.fnmatchcase(run.name, match)]
        require(bool(matching), "match", match,
                f"no run has such a name; there are {', '.join(names[:5])}, ...")
        return matching


def _module(experiment: str, name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{experiment}.{name}")


def experiments() -> list[str]:
    """The names of all experiments that are installed beside the library and train runs."""
    try:
        package = importlib.import_module("experiments")
    except ImportError:
        return []
    names = (module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)
    return sorted(name for name in names
                  if importlib.util.find_spec(f"experiments.{name}.configs") is not None)


def seeded(arms: Iterable[RunConfig], seeds: Iterable[int]) -> list[RunConfig]:
    """Every arm with every seed, named ARM-seedN; paired: a seed gives all arms the same batches
    in the same order, and the same start where their shapes agree."""
    return [changed(arm, {"name": f"{arm.name}-seed{seed}", "data.seed": seed,
                          "training.seed": seed})
            for seed in seeds for arm in arms]


def run_sweep(
    sweep: Sweep, directory: epath.PathLike, say: Say = print, mesh: Mesh | None = None,
    launcher: Launcher = local, only: tuple[int, int] = (0, 1), match: str = "*",
    allow_dirty: bool = False,
) -> list[dict[str, Any]]:
    """Train all runs of `sweep` in `directory`; results.csv, table.txt and the figure follow.

    Args:
      sweep: what to run.
      directory: gets one folder a run.
      say: gets lines for people.
      mesh: as `train` takes it.
      launcher: trains the runs, see `launchers`; by default in this process.
      only: (index, count), the share of the runs that one of `count` jobs does (`launchers.share`).
      match: the runs whose names match, of which `only` is a share. Parts of a sweep are not
        reported: call it without both, once all are done, or `report_so_far`.
      allow_dirty: run from a checkout with changes that are not committed.

    Returns:
      One dict a run, a row of results.csv each.

    Raises:
      UserError: runs that do not fit, uncommitted changes, or a folder of another sweep.
    """
    runs, folder = sweep.runs(match), epath.Path(directory)
    require(allow_dirty or not git_revision().endswith("+changes"), "git", "uncommitted changes",
            "nobody could run this again; commit them, or say --allow-dirty")
    runs = share(runs, *only)
    if launcher is local:  # another one has other devices
        forecast.check([forecast.forecast(run, mesh) for run in runs])
    with _claimed(sweep, folder):
        results = launcher(runs, folder, say, mesh)
    if distributed.is_first() and (only, match) == ((0, 1), "*"):
        report(sweep.experiment, results, folder, say)
    return results


def report_so_far(sweep: Sweep, directory: epath.PathLike, say: Say = print) -> int:
    """Report the runs of `sweep` in `directory` that are done or diverged, and train nothing.

    Returns:
      How many of its runs are done or diverged.

    Raises:
      UserError: none is, or the folder holds another sweep or other runs.
    """
    folder, done = epath.Path(directory), []
    _check_same(sweep, folder)
    for run in (runs := sweep.runs()):
        if (result := result_before(run, folder, lambda line: None)) is not None:
            done.append(result)
    require(bool(done), "out", str(directory), "holds no run of this sweep that is done")
    report(sweep.experiment, done, folder, say)
    lost = diverged(done)
    say(f"{len(done)} of {len(runs)} runs are done"
        + f", of which diverged: {', '.join(lost)}" * bool(lost))
    return len(done)


def dry_run(
    sweep: Sweep, say: Say = print, mesh: Mesh | None = None, match: str = "*", at_once: int = 1,
) -> None:
    """Say what every run would take; `described(scale)` of the experiment's configs comes first.

    Raises:
      UserError: runs that do not fit, alone or `at_once`, after everything was said.
    """
    configs = _module(sweep.experiment, "configs")
    if hasattr(configs, "described"):
        say(f"{configs.described(sweep.scale)}\n")
    forecasts = [forecast.forecast(run, mesh) for run in sweep.runs(match)]
    say(forecast.table(forecasts))
    forecast.check(forecasts, at_once)


@contextlib.contextmanager
def _claimed(sweep: Sweep, folder: epath.Path) -> Iterator[None]:
    """Write sweep.json, or refuse a folder that holds another sweep; more seeds may be added.

    Where the user can mend why no run began, the folder may be another sweep's yet.
    """
    new = distributed.is_first() and not _check_same(sweep, folder)
    if new:
        with refusals(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "sweep.json", json_text(_identity(sweep), indent=1) + "\n")
    try:
        yield
    except UserError:
        if new and [path.name for path in folder.iterdir()] == ["sweep.json"]:
            (folder / "sweep.json").unlink(missing_ok=True)  # another job's share began as little
        raise


def _identity(sweep: Sweep) -> dict[str, Any]:
    return {"experiment": sweep.experiment, "scale": sweep.scale, "settings": [*sweep.settings]}


def _check_same(sweep: Sweep, folder: epath.Path) -> bool:
    """Whether the folder holds this sweep; UserError if it holds another."""
    path = folder / "sweep.json"
    with refusals(path, "read"):
        if not path.exists():
            return False
        before = json.loads(path.read_text())
    if difference := first_difference(before, _identity(sweep)):
        field, theirs, ours = difference
        raise UserError(f"{field} = {ours!r}: {folder} holds a sweep with {theirs!r}; choose "
                        "another folder or delete this one")
    return True


def report(experiment: str, results: Sequence[Result], folder: epath.Path, say: Say) -> None:
    """Write results.csv, table.txt and the figure of finished runs."""
    own = _module(experiment, "report")
    rows = own.measured(results, folder) if hasattr(own, "measured") else results
    write_text(folder / "results.csv", to_csv(rows))
    text = own.table(rows)
    write_text(folder / "table.txt", text + "\n")
    save(own.figure(rows), folder / own.FIGURE)
    say(f"\n{text}\nfigure: {folder / own.FIGURE}")


def to_csv(results: Sequence[Result]) -> str:
    """A line each run; numbers are written so that reading gives the same bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(result) for result in results)
    return text.getvalue()


def from_csv(text: str) -> list[dict[str, Any]]:
    """What `to_csv` was given."""
    return [{name: _value(word) for name, word in row.items()}
            for row in csv.DictReader(io.StringIO(text))]


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word or None

