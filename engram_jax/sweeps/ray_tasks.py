"""What runs on the nodes of a Ray cluster: a run on one machine, or on all hosts of a TPU slice.

Ray gives the first host of a slice the resource TPU-TYPE-head, and all its hosts one that is called
as the slice is. The task on the first host starts a process of the run on every host; if one fails,
all end, and Ray starts that task again as it does with any other.
"""

import platform
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from engram_jax import __version__, distributed
from engram_jax.config import RunConfig, require
from engram_jax.errors import MachineError, UserError
from engram_jax.settings import from_dict
from engram_jax.settled import settle_sums
from engram_jax.storage import first_line
from engram_jax.sweeps.compilations import kept_compilations
from engram_jax.sweeps.member import result_of
from engram_jax.training.placement import chosen_mesh

WAIT_S = 600  # for hosts of a slice that is being made again
WORKER_ID = "ray.io/tpu-worker-id"  # a label of a slice's nodes
USER, MACHINE, BUG = 2, 1, 3  # how a process ended


class Desk:
    """An actor beside the launcher: what tasks say waits here until it is taken."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failures: dict[str, tuple[int, str]] = {}

    def put(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        """All lines since the last call."""
        taken, self._lines = self._lines, []
        return taken

    def fail(self, run: str, kind: int, line: str) -> None:
        """A process of `run` has failed; of several, the cause counts and not who heard of it."""
        self._failures[run] = max((kind, line), self._failures.get(run, (0, "")))

    def take_failure(self, run: str) -> tuple[int, str] | None:
        return self._failures.pop(run, None)


def wants_slice(needs: Mapping[str, float]) -> bool:
    """Whether these resources are those of a slice's first host."""
    return any(name.startswith("TPU-") and name.endswith("-head") for name in needs)


def train_here(
    values: Mapping[str, Any], folder: str, mesh: str | None, version: str, desk: Any
) -> dict[str, Any]:
    """The task of a run on one node; also what each process of a slice does.

    Args:
      values: the config.
      folder: of the sweep; the run's is in it.
      mesh: "DATAxFSDP", or as `chosen_mesh`.
      version: of the library where the sweep was started.
      desk: the handle of the actor `Desk`.
    """
    import ray

    require(version == __version__, "engram_jax", __version__,
            f"on {platform.node()}, but {version} started the sweep; install the same everywhere")
    if not epath.Path(folder).exists():
        raise UserError(f"out = {folder!r}: is not there on {platform.node()}; choose a folder "
                        "that all nodes see")
    run: RunConfig = from_dict(values)

    def say(line: str) -> None:
        named = line if line.startswith(run.name) else f"{run.name}: {line}"
        ray.get(desk.put.remote(named))

    settle_sums()  # a node's own environment knows nothing of the command's
    made = chosen_mesh(mesh)
    with kept_compilations():
        return result_of(run, epath.Path(folder), distributed.first_only(say), made)


def train_on_slice(
    values: Mapping[str, Any], folder: str, mesh: str | None, version: str, desk: Any
) -> dict[str, Any]:
    """The task of a run on a slice, on its first host; the arguments are those of `train_here`.

    Raises:
      UserError: what a process of the run raises.
      MachineError: a process was lost, or a host is not there.
    """
    import ray

    run, (name, hosts) = (values, folder, mesh, version, desk), _hosts(ray)
    with socket.socket() as listening:
        listening.bind(("", 0))
        coordinator = f"{hosts[0]['NodeManagerAddress']}:{listening.getsockname()[1]}"
    members = [_member_task(ray, name, host).remote(coordinator, len(hosts), number, run)
               for number, host in enumerate(hosts)]
    try:
        ended, _ = ray.wait(members)  # all are done soon, or one has failed
        result: dict[str, Any] = ray.get([*ended, *members])[0]
        return result
    except ray.exceptions.RayError as error:
        kind, line = ray.get(desk.take_failure.remote(values["name"])) or (
            MACHINE, f"slice {name}: {first_line(error)}")
        if kind == BUG:
            raise RuntimeError(line) from error
        raise (UserError if kind == USER else MachineError)(line) from error
    finally:
        for member in members:
            ray.cancel(member, force=True)


def _hosts(ray: Any) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """The slice's name, and its nodes, this one first, once all are there."""
    from ray.util import tpu

    name, count = str(tpu.get_current_pod_name()), tpu.get_current_pod_worker_count() or 1
    here, end = ray.get_runtime_context().get_node_id(), time.monotonic() + WAIT_S
    while True:
        alive = [node for node in ray.nodes() if node["Alive"] and name in node["Resources"]]
        if len(alive) >= count:
            return name, sorted(alive, key=lambda node: (
                node["NodeID"] != here, int(node["Labels"].get(WORKER_ID, 0))))
        if time.monotonic() > end:
            raise MachineError(f"slice {name}: {len(alive)} of its {count} hosts are there")
        time.sleep(1)


def _member_task(ray: Any, name: str, host: Mapping[str, Any]) -> Any:
    """The remote function of one process, on `host` and with all its chips."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return ray.remote(
        max_calls=1, max_retries=0, num_cpus=0,
        resources={name: 1, "TPU": host["Resources"]["TPU"]},
        scheduling_strategy=NodeAffinitySchedulingStrategy(host["NodeID"], soft=False),
    )(_member)


def _member(coordinator: str, count: int, number: int, run: Sequence[Any]) -> dict[str, Any]:
    """One process of a run; it tells the desk why it failed and takes the others with it."""
    import ray

    distributed.start(coordinator, count, number)
    try:
        result = train_here(*run)
        distributed.stop()
        return result
    except Exception as error:
        lost = distributed.lost(error)
        if isinstance(error, UserError):
            kind, line = USER, str(error)
        elif lost or isinstance(error, MachineError | OSError):
            kind, line = MACHINE, lost or str(error)
        else:
            kind, line = BUG, first_line(error)
        ray.get(run[-1].fail.remote(run[0]["name"], kind, line))
        distributed.leave(kind, line)
