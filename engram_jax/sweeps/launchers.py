"""Where a sweep's runs are trained: here, one by one or at once, or as tasks of a Ray cluster.

A launcher trains every run in a folder of its own, `folder/run.name`. Finished runs are skipped,
interrupted ones go on. It returns what their result.json hold, in the order of the runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from engram_jax.config import RunConfig, require
from engram_jax.errors import UserError
from engram_jax.sweeps.at_once import AtOnce
from engram_jax.sweeps.compilations import kept_compilations
from engram_jax.sweeps.member import result_of
from engram_jax.sweeps.ray_launcher import RayLauncher, parsed_resources
from engram_jax.training.placement import chosen_mesh

Launcher = Callable[
    [Sequence[RunConfig], epath.Path, Callable[[str], None], Mesh | None], list[dict[str, Any]]]

LAUNCHERS = ("local", "ray")


def local(
    runs: Sequence[RunConfig], folder: epath.Path, say: Callable[[str], None],
    mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
    """Train the runs in this process, one after another; errors are those of `result_of`.

    Programs that several runs share are compiled once (`compilations`).
    """
    results = []
    with kept_compilations():
        for number, run in enumerate(runs, start=1):
            say(f"run {number} of {len(runs)}: {run.name}")
            results.append(result_of(run, folder, say, mesh))
    return results


def chosen(
    name: str = "local", mesh: str | None = None, address: str = "", resources: str = "",
    at_once: int = 1,
) -> tuple[Launcher, Mesh | None]:
    """The launcher of the command line's words, and the mesh to call it with.

    Args:
      name: one of `LAUNCHERS`.
      mesh: "DATAxFSDP" of each run. With Ray it is made on the nodes, and this process is kept
        from taking their devices.
      address, resources: as `RayLauncher`; `resources` written as "CPU=4,GPU=1".
      at_once: how many runs the local launcher trains side by side, as `AtOnce`; a mesh of theirs
        is theirs, and this process is kept from taking their devices.

    Raises:
      UserError: no such launcher, settings of another one, or as `chosen_mesh`.
    """
    require(name in LAUNCHERS, "launcher", name, f"must be one of {', '.join(LAUNCHERS)}")
    require(at_once >= 1, "at-once", at_once, "must be at least 1")
    if name == "ray":
        require(at_once == 1, "at-once", at_once, "is for launcher = 'local'; Ray starts as many "
                "runs as --resources leaves room for")
        jax.config.update("jax_platforms", "cpu")  # this machine's accelerators are the tasks'
        return RayLauncher(address=address, resources=parsed_resources(resources), mesh=mesh), None
    for field, value in (("ray-address", address), ("resources", resources)):
        require(not value, field, value, "is for launcher = 'ray' only")
    if at_once > 1:
        jax.config.update("jax_platforms", "cpu")
        return AtOnce(count=at_once, mesh=mesh), None
    return local, chosen_mesh(mesh)


def share(runs: Sequence[RunConfig], index: int, count: int) -> list[RunConfig]:
    """The runs that one of `count` jobs does: `index`, counted from 0, and every `count`th after.

    Together the jobs do every run once; of more jobs than runs some have nothing to do.

    Raises:
      UserError: `index` is not in 0..count - 1.
    """
    require(0 <= index < count, "only", f"{index}/{count}",
            "must be INDEX/COUNT with an index from 0 to COUNT - 1")
    return list(runs[index::count])


def parsed_share(text: str) -> tuple[int, int]:
    """The numbers of "INDEX/COUNT".

    Raises:
      UserError: it is written otherwise.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UserError(f"only = {text!r}: must be INDEX/COUNT, for example 0/4 to 3/4")
    return int(index), int(count)
