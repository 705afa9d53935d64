"""What libraries say beside the exceptions that they raise."""

import logging
import os
import sys
import typing
from collections.abc import Callable


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
