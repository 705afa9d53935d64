"""Several processes train one run: how they start, agree, wait for each other and end together.

They talk through the key-value store of JAX's distributed runtime, never through a collective, so
whatever waits here ends: with an answer, or at a timeout that the message names. A thread of each
process says that it is alive and watches for the others' failures; process 0 watches for silence.

Where process 0 itself is killed, the store dies with it, and JAX's runtime ends the others at once
by SIGABRT; where it is stopped or its machine lost, within the timeout and GRACE_S. No setting of
JAX 0.10 to 0.12 changes that.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from engram_jax.config import require
from engram_jax.errors import MachineError, UserError
from engram_jax.settings import first_difference
from engram_jax.storage import first_line

TIMEOUT_S = 300
SILENCE_S = 100  # a process says every second that it is alive; JAX's own limit is the same
FIRST_S = 6 * 3600  # for what process 0 does while the others wait: packing a text
GRACE_S = 30  # what JAX's own checks wait longer than ours, which end with one line
PERIOD_S = 1.0
AHEAD = 2  # pieces of work by which processes may be apart
ROOT = "engram_jax"


@dataclasses.dataclass
class _Group:
    """This process among the others."""

    client: Any  # jaxlib's DistributedRuntimeClient
    process: int
    processes: int
    timeout_s: float
    silence_s: float
    calls: int = 0  # alike in all processes: no name is used twice
    ending: bool = False

    def place(self, what: str) -> str:
        """A folder of the store for one exchange."""
        self.calls += 1
        return f"{ROOT}/{self.calls}/{what}"

    def put(self, name: str, value: str) -> None:
        self.client.key_value_set(name, value, allow_overwrite=True)

    def under(self, folder: str) -> dict[int, str]:
        """What each process has put under its number."""
        return {int(key.rsplit("/", 1)[1]): value
                for key, value in self.client.key_value_dir_get(folder)}


_group: _Group | None = None
_leaving = threading.Lock()  # never released: one thread has the last word


def start(coordinator: str | None = None, processes: int | None = None,
          process: int | None = None, timeout_s: int = TIMEOUT_S) -> None:
    """Join the other processes; before anything asks JAX for its devices.

    With no argument the cluster is detected: Cloud TPU, Slurm, Kubernetes, Open MPI.

    Args:
      coordinator: HOST:PORT at which all can reach process 0.
      processes, process: how many there are, and which one this is, from 0 on.
      timeout_s: how long the others may take to come, and, if it is less than SILENCE_S, how long
        they may be silent later.

    Raises:
      UserError: settings that do not fit, or no cluster that could be detected.
      MachineError: the runtime refuses; another program has the port, for example.
    """
    global _group
    _check(coordinator, processes, process, timeout_s)
    # Between CPUs jaxlib has no other collectives; other platforms do not ask.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    late = (f"not all processes came to {coordinator or 'the coordinator'} within {timeout_s} s; "
            "start every one, and give each the same coordinator")
    silence_s = min(timeout_s, SILENCE_S)
    with _ends_after(timeout_s, late):
        try:
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=timeout_s + GRACE_S,
                heartbeat_timeout_seconds=silence_s + GRACE_S, shutdown_timeout_seconds=GRACE_S)
        except (ValueError, KeyError) as error:
            raise UserError(f"distributed: no cluster could be detected ({first_line(error)}); "
                            "give coordinator, processes and process") from error
        except (RuntimeError, OSError) as error:
            raise MachineError(f"cannot join the other processes: {first_line(error)}") from error
    from jax._src import distributed  # no public name leads to the client; Orbax takes this, too

    state = distributed.global_state
    _group = _Group(state.client, state.process_id, state.num_processes, timeout_s, silence_s)
    threading.Thread(target=_watch, args=(_group,), daemon=True).start()


def _check(coordinator: str | None, processes: int | None, process: int | None,
           timeout_s: int) -> None:
    require(timeout_s >= 1, "timeout", timeout_s, "must be at least 1 second")
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if coordinator is None or processes is None or process is None:
        raise UserError(f"{missing[0]}: is missing; coordinator, processes and process go together")
    require(coordinator.rpartition(":")[2].isdecimal(), "coordinator", coordinator,
            "must be HOST:PORT")
    require(processes >= 1, "processes", processes, "must be at least 1")
    require(0 <= process < processes, "process", process,
            f"must be 0 to {processes - 1} for processes = {processes}")


def stop() -> None:
    """Leave the others in good order, once all have come to their end."""
    global _group
    if _group is None:
        return
    barrier("the end")
    _group.ending, _group = True, None
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process keeps the records and talks; the only one does."""
    return jax.process_index() == 0  # as for Orbax


def first_only(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` in process 0, silence in the others."""
    return say if is_first() else lambda line: None


def barrier(name: str, timeout_s: float | None = None) -> None:
    """Wait until all processes are here; at once where there is one.

    Args:
      name: what they wait for, in messages.
      timeout_s: by default what `start` was given.

    Raises:
      MachineError: not all came in time.
    """
    if (group := _group) is None:
        return
    limit = group.timeout_s if timeout_s is None else timeout_s
    place = group.place(name)
    group.put(f"{place}/{group.process}", "")
    try:
        group.client.wait_at_barrier(place, int(limit * 1000))
    except RuntimeError as error:
        raise _late(group, name, limit, set(group.under(place))) from error


@contextlib.contextmanager
def after_first(name: str, timeout_s: float = FIRST_S) -> Iterator[None]:
    """What is within happens in process 0 and then in the others, which find it done.

    Where each machine has a disk of its own they find nothing, and do it themselves, all at once.

    Raises:
      MachineError: process 0 took longer than `timeout_s`.
    """
    if not is_first():
        barrier(name, timeout_s)
    yield
    if is_first():
        barrier(name, timeout_s)


def from_first(name: str, make: Callable[[], Any], timeout_s: float = FIRST_S) -> Any:
    """What `make` returns in process 0, plain JSON, in all of them.

    Raises:
      MachineError: process 0 took longer than `timeout_s`.
    """
    if (group := _group) is None:
        return make()
    path = group.place(name)
    if group.process == 0:
        value = make()
        group.put(path, json.dumps(value))
        return value
    try:
        return json.loads(group.client.blocking_key_value_get(path, int(timeout_s * 1000)))
    except RuntimeError as error:
        raise _late(group, name, timeout_s, set(range(1, group.processes))) from error


def agree(name: str, values: Mapping[str, Any], timeout_s: float | None = None) -> None:
    """Check that all processes have equal `values`, plain JSON.

    Raises:
      UserError: in all of them, naming the first field that differs.
      MachineError: not all came in time.
    """
    if (group := _group) is None:
        return
    limit = group.timeout_s if timeout_s is None else timeout_s
    place, text = group.place(name), json.dumps(values, sort_keys=True)
    group.put(f"{place}/whole/{group.process}", text)
    group.put(f"{place}/digest/{group.process}", hashlib.sha256(text.encode()).hexdigest())
    try:
        group.client.wait_at_barrier(place, int(limit * 1000))
    except RuntimeError as error:
        raise _late(group, name, limit, set(group.under(f"{place}/digest"))) from error
    digests = group.under(f"{place}/digest")
    for other in sorted(digests):
        if digests[other] != digests[0]:
            ours, theirs = (json.loads(group.client.blocking_key_value_get(
                f"{place}/whole/{number}", int(limit * 1000))) for number in (0, other))
            field, before, now = first_difference(ours, theirs) or (name, ours, theirs)
            raise UserError(f"{field} = {now!r} in process {other}, but {before!r} in process 0; "
                            "all processes of a run need the same")


def stops(piece: int, asked: bool) -> bool:
    """Whether all processes stop before this piece of work; alike in all of them.

    Each process asks before each piece, in the same order, and only with the results of all pieces
    but the last one behind it. So when one names a piece two ahead of its own, nobody has passed
    that yet, and everybody reads the name before it gets there.

    Args:
      piece: the number of the piece, from 1 on.
      asked: whether this process was told to stop.
    """
    if (group := _group) is None:
        return asked
    name = f"{ROOT}/stop"
    named = group.under(name)
    if not named and asked:
        with contextlib.suppress(RuntimeError):  # another process was quicker
            group.client.key_value_set(f"{name}/{piece + AHEAD}", "", allow_overwrite=False)
        named = group.under(name)
    return bool(named) and piece >= min(named)


def _late(group: _Group, name: str, limit: float, there: set[int]) -> MachineError:
    missing = sorted(set(range(group.processes)) - there)
    who = f"process {', '.join(map(str, missing[:8]))}" if missing else "the others"
    return MachineError(f"waited {limit:g} s at {name!r} for {who} of {group.processes} processes "
                        "(timeout): died, hanging or too slow")


def lost(error: BaseException) -> str | None:
    """One line for an exchange that broke because another process is gone; None for other errors.

    Where that process has said why it failed, this one ends here with that.
    """
    if _group is None or not isinstance(error, RuntimeError):
        return None
    if not any(word in str(error) for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED")):
        return None
    time.sleep(2 * PERIOD_S)  # `_watch` may know more, and ends this process
    return ("lost another process in the middle of an exchange: it was killed or its machine is "
            f"gone ({first_line(error)}; timeout of a silent one: {_group.silence_s:g} s)")


def leave(code: int, line: str) -> NoReturn:
    """End this process because of a failure, and so the others: they print `line`, too."""
    _leaving.acquire()
    _print(line)
    if (group := _group) is not None:
        with contextlib.suppress(Exception):  # the store may be gone already
            group.put(f"{ROOT}/failed/{group.process}", json.dumps([code, line]))
            end = time.monotonic() + 5 * PERIOD_S
            # The store dies with process 0: let the others read it.
            while (group.process == 0 and time.monotonic() < end
                   and len(group.under(f"{ROOT}/left")) < group.processes - 1):
                time.sleep(PERIOD_S / 5)
    os._exit(code)  # an ordinary exit waits for the others


def _watch(group: _Group) -> None:
    """Say that this process is alive; end it when another one has failed or fallen silent."""
    heard: dict[int, tuple[str, float]] = {}
    for beat in itertools.count():
        try:
            group.put(f"{ROOT}/alive/{group.process}", str(beat))
            failed = group.under(f"{ROOT}/failed")
            silent = _silent(group, heard) if group.process == 0 else None
        except Exception:  # no store, no process 0: JAX's runtime ends this one
            return
        if group.ending:
            return
        if silent is not None:
            leave(1, f"process {silent} has been silent for {group.silence_s:g} s (timeout): it "
                  "died or hangs, or its machine is gone")
        if failed:
            number, (code, line) = min((n, json.loads(text)) for n, text in failed.items())
            _leaving.acquire()
            _print(f"process {number} failed: {line}")
            with contextlib.suppress(Exception):
                group.put(f"{ROOT}/left/{group.process}", "")
            os._exit(code)
        time.sleep(PERIOD_S)


def _silent(group: _Group, heard: dict[int, tuple[str, float]]) -> int | None:
    """The first process whose beat has not changed for too long; keeps `heard`."""
    now, beats = time.monotonic(), group.under(f"{ROOT}/alive")
    for number in range(group.processes):
        beat = beats.get(number, "")
        if number not in heard or heard[number][0] != beat:
            heard[number] = beat, now
        elif now - heard[number][1] > group.silence_s:
            return number
    return None


@contextlib.contextmanager
def _ends_after(seconds: float, line: str) -> Iterator[None]:
    """End this process if what is within takes longer."""
    timer = threading.Timer(seconds, leave, (1, line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print(line: str) -> None:
    print(f"engram-jax: {' '.join(line.split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
