"""Ray as a launcher of sweeps: every run is a task of a cluster.

Ray starts a task again, wherever there is room, when its worker or its node is lost; the run then
goes on from its last checkpoint. So the folder of the sweep must be one that all nodes see. The
process that calls the launcher asks JAX for no device.
"""

import contextlib
import dataclasses
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from engram_jax import __version__
from engram_jax.config import RunConfig, require
from engram_jax.errors import MachineError, UserError
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import to_dict
from engram_jax.storage import first_line
from engram_jax.sweeps.member import result_before
from engram_jax.sweeps.ray_tasks import Desk, train_here, train_on_slice, wants_slice

RETRIES = 20  # of one run; machines that may be taken away any time need some
SECONDS_BETWEEN_LOOKS = 1.0
ANSWER_S = 10  # for a cluster to answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayLauncher:
    """Hands runs to a Ray cluster.

    Attributes:
      address: of the cluster, as `ray.init` takes it; "" joins the one that runs on this machine or
        that $RAY_ADDRESS names, and starts one on this machine where there is none.
      resources: what a run takes of a node, by Ray's names: {"CPU": 4, "GPU": 1}, {"TPU": 4}, or
        {"TPU-v6e-16-head": 1} for a whole slice, with a process on each of its hosts. CPU is 1
        where it is not named. Empty: a GPU; or else all TPU chips of a node; or else all CPUs of
        the smallest node.
      mesh: "DATAxFSDP" of a run, made where it trains; None as `chosen_mesh`.
      retries: how often a run may lose its worker.
    """

    address: str = ""
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mesh: str | None = None
    retries: int = RETRIES

    def __call__(
        self, runs: Sequence[RunConfig], folder: epath.Path, say: Callable[[str], None],
        mesh: Mesh | None = None,
    ) -> list[dict[str, Any]]:
        """Train the runs, as many at once as the cluster has room for.

        Raises:
          UserError: what a run raises; Ray is not installed, or no cluster answers.
          MachineError: a run lost its worker too often, or met a fault of every machine.
        """
        require(mesh is None, "mesh", mesh, "a mesh of this process is not one of Ray's nodes; "
                "give RayLauncher the shape")
        folder = RunDirectory(folder).path  # whole: a task has another working directory
        results = {run.name: result_before(run, folder, say) for run in runs}
        waiting = [run for run in runs if results[run.name] is None]
        if waiting:
            folder.mkdir(parents=True, exist_ok=True)
            with _cluster(self.address) as ray:
                results |= self._run(ray, waiting, folder, say)
        return [result for result in results.values() if result is not None]

    def _run(
        self, ray: Any, runs: Sequence[RunConfig], folder: epath.Path, say: Callable[[str], None]
    ) -> dict[str, dict[str, Any]]:
        """Results by name."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = self.resources or _share_of_node(nodes)
        words = ", ".join(f"{name}={amount:g}" for name, amount in needs.items())
        say(f"ray: {len(runs)} runs, {words} each, on {len(nodes)} nodes")
        if not any(all(node.get(name, 0) >= needs[name] for name in needs) for node in nodes):
            say(f"ray: no node has {words} now; waiting for one that does")
        desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=_here(ray)).remote()
        # A worker ends with its task: JAX would keep its devices for as long as it lives.
        task = ray.remote(
            max_calls=1, max_retries=self.retries, retry_exceptions=[MachineError],
            num_cpus=needs.get("CPU", 1), num_gpus=needs.get("GPU", 0),
            resources={name: n for name, n in needs.items() if name not in ("CPU", "GPU")},
        )(train_on_slice if wants_slice(needs) else train_here)
        tasks = {task.options(name=run.name).remote(
            to_dict(run), os.fspath(folder), self.mesh, __version__, desk): run.name
            for run in runs}
        return _gathered(ray, tasks, desk, say)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """The module `ray`, connected; to the cluster that this process has joined if there is one.

    Raises:
      UserError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("launcher = 'ray': needs Ray; pip install 'engram_jax[sweep]'") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours tells nobody
    try:
        with warnings.catch_warnings():  # Ray forks and executes, which JAX takes for fork alone
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            ray.init(address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"ray-address = {address!r}: no cluster of Ray {ray.__version__} can be "
                        f"joined ({first_line(error)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse (UserError) where nobody listens: Ray itself would try for minutes."""
    require(not address.startswith("ray://"), "ray-address", address, "is of the Ray Client; start "
            "the sweep on a machine of the cluster, by `ray job submit` for example")
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"ray-address = {address!r}: nobody listens there "
                        f"({first_line(error)})") from error


def _here(ray: Any) -> Any:
    """Only on the node of this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _share_of_node(nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a run takes where nothing else is said, of nodes with these resources."""
    for name in ("GPU", "TPU", "CPU"):
        if amounts := [node[name] for node in nodes if node.get(name)]:
            return {"CPU": 1, name: 1 if name == "GPU" else min(amounts)}
    return {"CPU": 1}


def _gathered(
    ray: Any, tasks: Mapping[Any, str], desk: Any, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Results by name, once all tasks are done; what they say meanwhile goes to `say`."""
    results, waiting = {}, list(tasks)
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=SECONDS_BETWEEN_LOOKS)
            for line in ray.get(desk.take.remote()):
                say(line)
            for done in ready:
                results[tasks[done]] = _result(ray, done, tasks[done])
    finally:
        for left in waiting:
            ray.cancel(left, force=True)  # it goes on from its checkpoint next time
        ray.kill(desk)
    return results


def _result(ray: Any, task: Any, name: str) -> dict[str, Any]:
    """What a task returned, or the error that it raised, as if it had been called here."""
    try:
        result: dict[str, Any] = ray.get(task)
        return result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | MachineError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise MachineError(f"{name}: lost its worker too often ({first_line(error)}); the same "
                           "command goes on from the last checkpoint") from error


def parsed_resources(text: str) -> dict[str, float]:
    """{"CPU": 4.0, "GPU": 1.0} of "CPU=4,GPU=1"; {} of "".

    Raises:
      UserError: an amount that is missing, not a number, not positive, or above 1 and not whole.
    """
    amounts = {}
    for part in text.split(",") if text else []:
        name, _, amount = part.strip().partition("=")
        try:
            number = float(amount)
        except ValueError:
            number = math.nan
        require(bool(name) and 0 < number < math.inf and (number <= 1 or number == int(number)),
                "resources", text, "must be NAME=AMOUNT,... with whole amounts or parts of one, "
                "for example CPU=4,GPU=1")
        amounts[name] = number
    return amounts
