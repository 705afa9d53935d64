"""Compiled programs kept on disk, so that the runs of a sweep which share one compile it once.

Seeds of an arm, a sweep that goes on after it was cut, and arms that differ in a rate share
programs: of `tiny` on one core, compiling takes about as long as training for 130 steps. What is
read from the disk is the machine code that was compiled before, so runs have the same bits. It
is run as it is read: a folder that others may write to is not for $ENGRAM_CACHE.

JAX does not look at what it reads: a damaged program may end the process, at every start anew, and
one that a kill left half-written is never replaced. So each has its digest beside it,
`PROGRAM.sha256`, written when the process comes to its end, and what has another one or none is
removed before it can be run; it is compiled again.
"""

import contextlib
import hashlib
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from engram_jax.data.cache import download_folder
from engram_jax.errors import MachineError
from engram_jax.storage import write_text

SECONDS = 0.5  # what compiles faster is not kept
PROGRAMS = "*-cache"  # JAX's names
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": SECONDS,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def kept_compilations() -> Iterator[None]:
    """JAX's persistent compilation cache, in the user's cache folder, for what is within.

    One that the process has already ($JAX_COMPILATION_CACHE_DIR) is left as it is, and one of
    several processes keeps nothing: JAX writes the first one's programs alone, so it would wait in
    an exchange while the others compile.
    """
    if jax.config.values["jax_compilation_cache_dir"] or jax.distributed.is_initialized():
        yield
        return
    settings = {"jax_compilation_cache_dir": str(folder()), **SETTINGS}
    before = {name: jax.config.values[name] for name in settings}
    _remove_damaged()
    try:
        _set(settings)
        yield
    finally:
        _set(before)
        _note()


def _set(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX looks at the folder once, at the first compilation


def _remove_damaged() -> None:
    """Remove programs that are not what was noted."""
    for program in folder().glob(PROGRAMS):
        with contextlib.suppress(OSError):  # another process has removed it
            if not _beside(program).exists() or _beside(program).read_text() != _digest(program):
                program.unlink()
                _beside(program).unlink(missing_ok=True)


def _note() -> None:
    """Note the digests of new programs."""
    for program in folder().glob(PROGRAMS):
        with contextlib.suppress(OSError, MachineError):  # a full disk: it is compiled again
            if not _beside(program).exists():
                write_text(epath.Path(_beside(program)), _digest(program))


def _beside(program: pathlib.Path) -> pathlib.Path:
    return program.with_name(f"{program.name}.sha256")


def _digest(program: pathlib.Path) -> str:
    return hashlib.sha256(program.read_bytes()).hexdigest()


def folder() -> pathlib.Path:
    """Name the folder of this kind of processor; machines that share a disk may have others."""
    return download_folder().parent / "programs" / _processor()


def _processor() -> str:
    """A name for the instructions that this machine has."""
    words = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        words |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:16]
