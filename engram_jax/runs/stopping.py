"""What a run does when it is told to stop: SIGTERM, as clusters send it, or Ctrl-C.

The first signal lets the step under way end; then a checkpoint of it is written and the process
ends, and the same command goes on from there. Before the first step there is nothing to keep, and
it ends as soon as Python hears of it. A thread hears signals at once, even while the main one
compiles or waits for a device: it ends the process when the grace is over, or at a second signal.
Two SIGTERMs within a second are one that was passed on: clusters tell every process, and a first
process of several tells the others.

Several processes stop before the same piece of work (`distributed.stops`), whichever was told.
"""

import os
import signal
import socket
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from engram_jax import distributed
from engram_jax.errors import STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PASSED_ON_S = 1.0  # SIGTERMs within it are one
LAST_WORDS_S = 1.0  # for telling the other processes of a second signal


class Stopping:
    """Listens for signals while a run is under way; use as a context manager.

    Outside the main thread Python can hear of no signal, and nothing is changed.

    Args:
      grace_s: seconds from the first signal to the end (`training.grace_seconds`).
      say: gets a line at the first signal.
    """

    def __init__(self, grace_s: float, say: Callable[[str], None]):
        self._grace_s, self._say = grace_s, say
        self._asked: str | None = None
        self._working = self._raised = self._over = False
        self._pieces = 0
        self._at_last: list[Callable[[], None]] = []
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self
        ours, self._theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        threading.Thread(target=self._listen, args=(self._theirs,), daemon=True).start()
        self._fd = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd)
        self._before, self._over = {}, True
        self._socket.close()  # and so the thread ends
        if self._timer is not None:
            self._timer.cancel()
        if self._asked and not self._working and isinstance(error, Exception):
            raise self._stopped() from error  # a library took `Stopped` for a failure of its own

    def at_last(self, deed: Callable[[], None]) -> None:
        """What is to be done even where the process is ended from outside its main thread."""
        self._at_last.append(deed)

    def begin(self) -> None:
        """From here on there is work to keep: a signal waits for `due`."""
        self._working = True

    def due(self) -> bool:
        """Whether to stop before the next piece of work: a step, or a batch of an evaluation.

        Several processes ask before the same pieces, each with all but the last one behind it.
        """
        self._pieces += 1
        return distributed.stops(self._pieces, self._asked is not None)

    @property
    def reason(self) -> str:
        """What told this process, or another one, to stop."""
        return self._asked or "another process"

    def _hear(self, number: int, frame: types.FrameType | None) -> None:
        """Hear of a signal in the main thread, between two instructions of Python.

        `Stopped` is raised once: the same signal, passed on, would cut short what is tidied up.
        """
        self._asked = self._asked or signal.Signals(number).name
        if not (self._working or self._raised):
            self._raised = True
            raise self._stopped()

    def _stopped(self) -> Stopped:
        return Stopped(f"stopped by {self._asked} before the first step of this start; the same "
                       "command begins again", together=False)

    def _listen(self, heard: socket.socket) -> None:
        """Hear of a signal in a thread of its own, as soon as the system has it."""
        first = None
        with heard:
            while data := heard.recv(64):
                for number in data:
                    if number not in SIGNALS:
                        continue
                    name = signal.Signals(number).name
                    if first is None:
                        first = number, time.monotonic()
                        self._first(name)
                    elif not (first[0] == number == signal.SIGTERM
                              and time.monotonic() - first[1] < PASSED_ON_S):
                        self._end(128 + number, f"ended at once by a second signal ({name}); the "
                                  "same command goes on from the last checkpoint", LAST_WORDS_S)

    def _first(self, name: str) -> None:
        self._asked = name
        self._timer = threading.Timer(self._grace_s, self._end, (
            STOPPED, f"{name}: did not come to an end within {self._grace_s:g} s "
            "(training.grace_seconds); the same command goes on from the last checkpoint"))
        self._timer.daemon = True
        self._timer.start()
        self._say(f"{name}: stopping after this step and its checkpoint, within {self._grace_s:g} s"
                  "; a second one stops at once")

    def _end(self, code: int, line: str, within_s: float = 2 * distributed.GRACE_S) -> None:
        """End the process, whatever its main thread does."""
        if self._over:  # it has left the run in the meantime
            return
        watchdog = threading.Timer(within_s, os._exit, (code,))
        watchdog.daemon = True
        watchdog.start()
        for deed in self._at_last:
            deed()
        distributed.leave(code, line)
