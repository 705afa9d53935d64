"""What libraries say beside the exceptions that they raise."""

import logging
import os
import sys
import typing
from collections.abc import Callable

from engram_jax.errors import Stopped


def quieten() -> None:
    """Keep what libraries say beside their exceptions off standard error: what matters is raised.

    The hub's client logs each retry; after a read that failed, orbax's other reads go on and find
    their event loop closed. A run's `Stopped` that was raised while Python collected garbage goes
    nowhere, and the run stops before its next step all the same.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _OrphansAside):
        sys.unraisablehook = _OrphansAside(sys.unraisablehook)


class _OrphansAside:
    """The hook for exceptions that nobody can catch, without those of orphaned reads and stops."""

    def __init__(self, before: Callable[[typing.Any], object]):
        self._before = before

    def __call__(self, unraisable: typing.Any) -> None:
        error = unraisable.exc_value
        if not isinstance(error, Stopped) and str(error) != "Event loop is closed":
            self._before(unraisable)
