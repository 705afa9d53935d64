"""How a command ends: its exit code, and the one line that gives the reason."""

import logging
import os
import sys
import typing
from collections.abc import Callable

from engram_jax.errors import STOPPED, MachineError, Stopped, UserError


def ending(error: BaseException) -> tuple[int, str] | None:
    """Exit code and line of a failure; None for a bug."""
    match error:
        case UserError():
            return 2, one_line(error)
        case BrokenPipeError():
            return 1, ""
        case MachineError() | OSError() | MemoryError():
            return 1, one_line(error)
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
            return 1, one_line(MachineError(f"out of memory: {error}"))
        case Stopped():
            return STOPPED, one_line(error)
        case KeyboardInterrupt():
            return 130, "stopped; the same command goes on from the last checkpoint"
    return None


def one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def quieten() -> None:
    """Keep what libraries say beside their exceptions off standard error: what matters is raised.

    The hub's client logs each retry; after a read that failed, orbax's other reads go on and find
    their event loop closed.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _OrphansAside):
        sys.unraisablehook = _OrphansAside(sys.unraisablehook)


class _OrphansAside:
    """The hook for exceptions that nobody can catch, without those of orphaned reads."""

    def __init__(self, before: Callable[[typing.Any], object]):
        self._before = before

    def __call__(self, unraisable: typing.Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)
