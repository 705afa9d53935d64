"""Compiled programs kept on disk, so that the runs of a sweep which share one compile it once.

Seeds of an arm, a sweep that goes on after it was cut, and arms that differ in a rate share
programs: of `tiny` on one core, compiling takes about as long as training for 130 steps. What is
read from the disk is the machine code that was compiled before, so runs have the same bits. It
is run as it is read: a folder that others may write to is not for $ENGRAM_CACHE.
"""

import contextlib
import hashlib
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from engram_jax.data.cache import download_folder

SECONDS = 0.5  # what compiles faster is not kept
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
    try:
        _set(settings)
        yield
    finally:
        _set(before)


def _set(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX looks at the folder once, at the first compilation


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
