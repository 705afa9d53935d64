"""A profile of chosen steps, which XProf and Perfetto open: `engram-jax train --profile 20:25`."""

from types import TracebackType

import jax
from etils import epath

from engram_jax.config import require
from engram_jax.errors import UserError


class Profile:
    """Traces the steps from the first to the last; use as a context manager around all steps.

    Every process writes its own part, to DIR/profile: for XProf `*.xplane.pb`, for Perfetto
    `perfetto_trace.json.gz`.

    Args:
      folder: of the run.
      steps: "FIRST:LAST", both included; "" traces nothing.

    Raises:
      UserError: no such steps.
    """

    def __init__(self, folder: epath.Path, steps: str = ""):
        self._folder = folder / "profile"
        self._first, self._last = parsed(steps)
        self._open = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop()

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context manager for a step; the first one opens the trace."""
        if number == self._first:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._open = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, result: object) -> None:
        """After a step was dispatched; the last one closes the trace when it is done."""
        if self._open and number >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


def parsed(steps: str) -> tuple[int, int]:
    """First and last step of "FIRST:LAST"; (0, 0) of "".

    Raises:
      UserError: it is something else.
    """
    if not steps:
        return 0, 0
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise UserError(f"--profile {steps}: must be FIRST:LAST, for example 20:25")
    require(1 <= int(first) <= int(last), "--profile", steps,
            "must name steps from 1 on, the first one before the last")
    return int(first), int(last)
