"""Several runs at once on this machine's devices, each in a process of its own.

A small model leaves a GPU waiting for its host, and several of them share it. On GPUs of NVIDIA a
multi-process service (`nvidia-cuda-mps-control -d`) lets their kernels run beside one another;
without it the GPU takes turns.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, NoReturn

import jax
from etils import epath
from jax.sharding import Mesh

from engram_jax.config import RunConfig, require
from engram_jax.errors import MachineError, Stopped
from engram_jax.quiet import quieten
from engram_jax.settings import from_dict, to_dict
from engram_jax.sweeps import compilations
from engram_jax.sweeps.member import result_of
from engram_jax.training.placement import chosen_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtOnce:
    """Trains runs of a sweep side by side in processes of this machine.

    A process trains run after run; programs are compiled once for all, as with `local`. Runs begin
    seed after seed, and in each the longest first, so that none is alone at the end.

    Attributes:
      count: how many runs at once. All have the same devices, and none keeps memory of a GPU that
        it does not use.
      mesh: "DATAxFSDP" of each run; None as `chosen_mesh`.
    """

    count: int
    mesh: str | None = None

    def __call__(
        self, runs: Sequence[RunConfig], folder: epath.Path, say: Callable[[str], None],
        mesh: Mesh | None = None,
    ) -> list[dict[str, Any]]:
        """Train the runs; this process asks JAX for no device.

        Raises:
          UserError: what a run raises.
          MachineError: a process was lost, or what a run raises.
          Stopped: SIGTERM; Ctrl-C raises KeyboardInterrupt. Each run has written a checkpoint.
        """
        require(mesh is None, "mesh", mesh, "devices of this process are not those of the others; "
                "give AtOnce the shape")
        ordered = sorted(runs, key=lambda run: (run.training.seed, -run.training.steps))
        say(f"{len(runs)} runs, {self.count} at once")
        results: dict[str, dict[str, Any]] = {}
        with compilations.kept_compilations(), _processes(self.count) as pool:
            futures = [pool.submit(_train, to_dict(run), os.fspath(folder), self.mesh)
                       for run in ordered]
            for done in as_completed(futures):
                try:
                    result = done.result()
                except BrokenProcessPool as error:
                    raise MachineError("a process of the sweep was lost (out of memory?); the same "
                                       "command goes on from the last checkpoints") from error
                results[result["name"]] = result
                say(f"{result['name']}: done, loss {result['loss']:.4f}; {len(results)} of "
                    f"{len(runs)}")
        return [results[run.name] for run in runs]


@contextlib.contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are told to stop, and waited for, where this one fails or is told to."""
    kept = {name: jax.config.values[name]
            for name in ("jax_compilation_cache_dir", *compilations.SETTINGS)}
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (kept,))
    try:
        with _stopped_by_sigterm():
            yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def hear(number: int, frame: types.FrameType | None) -> NoReturn:
        raise Stopped("stopped by SIGTERM; the same command goes on from the last checkpoints")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _begin(settings: Mapping[str, Any]) -> None:
    """What a new process does first; `settings` are JAX's, where programs are kept."""
    quieten()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.setsid()  # a terminal's Ctrl-C is for the first process, which tells the others
    for name, value in settings.items():
        jax.config.update(name, value)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a run under way writes a checkpoint


def _train(values: Mapping[str, Any], folder: str, mesh: str | None) -> dict[str, Any]:
    run: RunConfig = from_dict(values)

    def say(line: str) -> None:
        print(line if line.startswith(run.name) else f"{run.name}: {line}", flush=True)

    return result_of(run, epath.Path(folder), say, chosen_mesh(mesh))
