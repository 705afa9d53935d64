"""A bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping

import tqdm

from engram_jax.distributed import is_first

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows how far a run is; use as a context manager."""

    def __init__(self, name: str, start: int, steps: int, say: Callable[[str], None]):
        self._name, self._steps, self._say = name, steps, say
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self._bar = None
        if sys.stderr.isatty() and is_first():
            self._bar = tqdm.tqdm(desc=name, initial=start, total=steps, unit="step", leave=False)
        else:
            say(f"{name}: steps {start + 1} to {steps} (the first one compiles)")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        loss = metrics["learning/loss"]
        rate = metrics["perf/per_device_tokens_per_sec"]
        speed = f"{rate:,.0f} tokens/s" if rate else "compiled"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
            self._bar.update(1)
        elif time.monotonic() >= self._next_line:
            self._say(f"{self._name}: step {number} of {self._steps}, loss {loss:.3f}, {speed}")
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
