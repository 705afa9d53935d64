"""A sweep: a named list of full configs, run one after another and set side by side.

An experiment is a folder `experiments/NAME` whose `configs.py` has `runs() -> list[RunConfig]`,
and whose `report.py`, if there is one, has `report(results, place, say)`.
Finished runs are skipped, interrupted ones go on.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from engram_jax.analysis import figures, scaling
from engram_jax.config import RunConfig, require
from engram_jax.errors import UserError
from engram_jax.settings import with_settings
from engram_jax.storage import write_text
from engram_jax.training import processes
from engram_jax.training.loop import train


def experiment(name: str) -> list[RunConfig]:
    """The runs of an experiment.

    Raises:
      UserError: no experiment has that name.
    """
    if name not in (names := experiments()):
        raise UserError(f"experiment = {name!r}: no such experiment; there are {', '.join(names)}")
    runs: list[RunConfig] = importlib.import_module(f"experiments.{name}.configs").runs()
    return runs


def experiments() -> list[str]:
    """The names of all experiments that are installed beside the library."""
    try:
        package = importlib.import_module("experiments")
    except ImportError:
        return []
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__)
                  if module.ispkg)


def sweep(
    name: str, directory: epath.PathLike, settings: Sequence[str] = (),
    say: Callable[[str], None] = print, mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
    """Run an experiment in `directory` and write results.json, table.txt and the figure there.

    Args:
      name: the experiment.
      directory: gets one folder a run.
      settings: "field=value", applied to every run.
      say: gets lines for people.
      mesh: as `train` takes it.

    Returns:
      One dict a run, as results.json holds them.
    """
    runs = [with_settings(run, settings) for run in experiment(name)]
    names = [run.name for run in runs]
    require(len(set(names)) == len(names), "name", names, "every run of a sweep needs its own")
    place, results = epath.Path(directory), []
    for number, run in enumerate(runs, start=1):
        say(f"run {number} of {len(runs)}: {run.name}")
        results.append(train(run, place / run.name, say, mesh))
    if processes.is_first():
        _report_of(name)(results, place, say)
    return results


def _report_of(name: str) -> Callable[..., None]:
    """The experiment's own `report`, if it has one, or else the general one."""
    module = f"experiments.{name}.report"
    try:
        found: Callable[..., None] = importlib.import_module(module).report
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # something that the report needs
        return report
    return found


def report(
    results: Sequence[dict[str, Any]], place: epath.Path, say: Callable[[str], None]
) -> None:
    """Set finished runs side by side: results.json, table.txt, and a figure where sizes vary."""
    write_text(place / "results.json", json.dumps(list(results), indent=1) + "\n")
    lines = [scaling.table(results)]
    line = scaling.fit(results)
    if line is not None:
        lines += ["", str(line)]
        figure = place / "loss_against_slots.png"
        figures.memory_scaling(results, figure)
    text = "\n".join(lines)
    write_text(place / "table.txt", text + "\n")
    say("\n" + text)
    if line is not None:
        say(f"figure: {figure}")
