"""What nobody can catch is shown, but for what is known to mean nothing."""

import gc
import sys

import pytest

from engram_jax.errors import Stopped
from engram_jax.quiet import quieten


@pytest.mark.parametrize(("error", "shown"), [
    (Stopped("stopped by SIGTERM before the first step"), False),
    (RuntimeError("Event loop is closed"), False),
    (RuntimeError("another"), True),
])
def test_what_is_raised_while_garbage_is_collected(error, shown, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    quieten()
    quieten()

    def fail(phase, info):
        if phase == "start":
            raise error

    gc.callbacks.append(fail)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(fail)
    assert told == [error] * shown
