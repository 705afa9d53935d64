"""Several runs at once on this machine's devices, each in a process of its own.

A small model leaves a GPU waiting for its host, and several of them share it. On GPUs of NVIDIA a
multi-process service (`nvidia-cuda-mps-control -d`) lets their kernels run beside one another;
without it the GPU takes turns.

No pool of the standard library: one tells all processes to stop when one is lost, some of them
twice, and begins what waits in its queue after the others were told to stop.
"""

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import jax
from etils import epath
from jax.sharding import Mesh

from engram_jax.config import RunConfig, require
from engram_jax.costs import forecast
from engram_jax.errors import MachineError, Stopped
from engram_jax.quiet import quieten
from engram_jax.runs.stopping import PASSED_ON_S
from engram_jax.settings import from_dict, to_dict
from engram_jax.sweeps import compilations
from engram_jax.sweeps.member import result_of
from engram_jax.training.placement import chosen_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtOnce:
    """Trains runs of a sweep side by side in processes of this machine.

    A process trains run after run, and finds on disk the programs that others have compiled; those
    that begin together compile alike. Runs begin seed after seed, and in each the longest first,
    so that none is alone at the end.

    Attributes:
      count: how many runs at once. All have the same devices, and none keeps memory of a GPU that
        it does not use.
      mesh: "DATAxFSDP" of each run; None as `chosen_mesh`.
    """

    count: int
    mesh: str | None = None

    def __post_init__(self) -> None:
        require(self.count >= 1, "count", self.count, "must be at least 1")

    def __call__(
        self, runs: Sequence[RunConfig], folder: epath.Path, say: Callable[[str], None],
        mesh: Mesh | None = None,
    ) -> list[dict[str, Any]]:
        """Train the runs; this process asks JAX for no device.

        Raises:
          UserError: runs that do not fit beside one another, or what a run raises.
          MachineError: a process was lost, or what a run raises.
          Stopped: SIGTERM; Ctrl-C raises KeyboardInterrupt. Whatever is raised, runs under way have
            written a checkpoint, and no other has begun.
        """
        require(mesh is None, "mesh", mesh, "devices of this process are not those of the others; "
                "give AtOnce the shape")
        ordered = sorted(runs, key=lambda run: (run.training.seed, -run.training.steps))
        values = [to_dict(run) for run in ordered]
        results: dict[str, dict[str, Any]] = {}
        with compilations.kept_compilations(), _workers(min(self.count, len(runs))) as workers:
            if workers:
                workers[0].ask(_check, values, self.mesh, self.count)
                workers[0].answer()
            say(f"{len(runs)} runs, {self.count} at once")
            tasks = ((_train, each, os.fspath(folder), self.mesh) for each in values)
            for result in _answers(workers, tasks):
                results[result["name"]] = result
                ended = (f"done, loss {result['loss']:.4f}" if math.isfinite(result["loss"])
                         else "diverged")
                say(f"{result['name']}: {ended}; {len(results)} of {len(runs)}")
        return [results[run.name] for run in runs]


class _Worker:
    """A process that does what it is asked to, one thing after another, until that fails."""

    def __init__(self, settings: Mapping[str, Any]):
        spawning = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawning.Pipe()
        self.busy = False
        self._process = spawning.Process(target=_work, args=(theirs, settings))
        self._process.start()
        theirs.close()  # and so the pipe ends with the process

    def ask(self, *task: Any) -> None:
        """Have a function called: it and its arguments."""
        self.busy = True
        with contextlib.suppress(OSError):  # it is lost, which `answer` tells
            self.pipe.send(task)

    def answer(self) -> Any:
        """Wait for what the function returned, or raise what it raised."""
        try:
            value = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise MachineError("a process of the sweep was lost (out of memory?); the same "
                               "command goes on from the last checkpoints") from error
        self.busy = False
        if isinstance(value, BaseException):
            raise value
        return value

    def stop(self) -> None:
        """Tell it once to stop: twice would be at once, without a checkpoint."""
        if self.busy:
            self._process.terminate()
        self.pipe.close()

    def join(self) -> None:
        self._process.join()


@contextlib.contextmanager
def _workers(count: int) -> Iterator[list[_Worker]]:
    """Processes that are told to stop, and waited for, at the end, and where this one fails or is
    told to."""
    kept = {name: jax.config.values[name]
            for name in ("jax_compilation_cache_dir", *compilations.SETTINGS)}
    workers: list[_Worker] = []
    try:
        with _stopped_by_sigterm():
            for _ in range(count):
                with _deaf_to_ctrl_c():
                    workers.append(_Worker(kept))
            yield workers
    finally:
        with _deaf_to_what_is_passed_on(sys.exc_info()[1]):
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join()


def _answers(workers: Sequence[_Worker], tasks: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
    """Share the tasks out, in their order, to whoever is free; yields answers as they come."""
    for worker, task in zip(workers, tasks):  # noqa: B905 (as many as there are workers)
        worker.ask(*task)
    while busy := [worker for worker in workers if worker.busy]:
        ready = wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe in ready:
                answer = worker.answer()
                for task in itertools.islice(tasks, 1):
                    worker.ask(*task)
                yield answer


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def hear(number: int, frame: types.FrameType | None) -> NoReturn:
        raise Stopped("stopped by SIGTERM; the same command goes on from the last checkpoints")

    with _handled(signal.SIGTERM, hear):
        yield


def _deaf_to_what_is_passed_on(
    error: BaseException | None,
) -> contextlib.AbstractContextManager[None]:
    """After one SIGTERM others are that one for as long as in a run; then one ends this process."""
    if not isinstance(error, Stopped):
        return contextlib.nullcontext()
    begin = time.monotonic()

    def hear(number: int, frame: types.FrameType | None) -> None:
        if time.monotonic() - begin >= PASSED_ON_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    return _handled(signal.SIGTERM, hear)


@contextlib.contextmanager
def _handled(number: int, handler: Any) -> Iterator[None]:
    """A handler of a signal, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _deaf_to_ctrl_c() -> contextlib.AbstractContextManager[None]:
    """What is started meanwhile is born deaf to Ctrl-C, which is for the first process: it tells
    the others. They leave the terminal later, and would end with a traceback until then."""
    return _handled(signal.SIGINT, signal.SIG_IGN)


def _work(pipe: Connection, settings: Mapping[str, Any]) -> None:
    """What a process does; `settings` are JAX's, where programs are kept."""
    quieten()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.setsid()  # a terminal's Ctrl-C is for the first process
    for name, value in settings.items():
        jax.config.update(name, value)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # nobody asks any more
        while True:
            task, *arguments = pipe.recv()
            try:
                pipe.send(task(*arguments))
            except BaseException as error:
                pipe.send(_portable(error))
                return


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a run under way writes a checkpoint


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, as another process can have it."""
    note = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # of a library's own kind
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _check(values: Sequence[Mapping[str, Any]], mesh: str | None, count: int) -> None:
    """Refuse runs that do not fit (UserError), where the devices are."""
    made = chosen_mesh(mesh)
    forecast.check([forecast.forecast(from_dict(each), made) for each in values], count)


def _train(values: Mapping[str, Any], folder: str, mesh: str | None) -> dict[str, Any]:
    run: RunConfig = from_dict(values)

    def say(line: str) -> None:
        print(line if line.startswith(run.name) else f"{run.name}: {line}", flush=True)

    return result_of(run, epath.Path(folder), say, chosen_mesh(mesh))
