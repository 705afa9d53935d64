"""How a command ends: its exit code, and the one line that gives the reason."""

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
