"""The folder that keeps what is made from text once: trained tokenizers and token shards."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from etils import epath

from engram_jax.config import DataConfig
from engram_jax.errors import MachineError
from engram_jax.storage import check_readable, is_local, refusals, upload

FORMAT = 2  # raise it when the same text would be trained on or packed differently
PREFIX = ".making-"  # of working folders
FRESH_S = 60


def cache_folder(config: DataConfig) -> epath.Path:
    """`config.cache_dir`, or else $ENGRAM_CACHE, or else engram_jax in the user's cache."""
    named = config.cache_dir or os.environ.get("ENGRAM_CACHE")
    if named:
        check_readable(named, "data.cache_dir" if config.cache_dir else "ENGRAM_CACHE")
        return epath.Path(named).expanduser()
    return _user_folder()


def download_folder() -> pathlib.Path:
    """Where copies of what is in object storage are kept: $ENGRAM_CACHE if that is a disk."""
    named = os.environ.get("ENGRAM_CACHE", "")
    folder = epath.Path(named).expanduser() if named and is_local(named) else _user_folder()
    return pathlib.Path(folder) / "downloads"


def noted_folder() -> pathlib.Path:
    """Where this machine notes which of its files it has checked."""
    return download_folder().parent / "checked"


def _user_folder() -> epath.Path:
    user = os.environ.get("XDG_CACHE_HOME") or (
        "~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return epath.Path(user).expanduser() / "engram_jax"


def cache_key(*parts: object) -> str:
    """A name for what was made from `parts`, plain JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def working_folder(config: DataConfig) -> Iterator[pathlib.Path]:
    """A fresh local folder, gone afterwards; beside the cache where that is local.

    Raises:
      MachineError: the machine refuses what is done to the cache within.
    """
    root = cache_folder(config)
    try:
        if is_local(root):
            root.mkdir(parents=True, exist_ok=True)
        if is_local(root):
            _sweep(pathlib.Path(root))
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=root if is_local(root) else None)
        try:
            with (pathlib.Path(folder) / "lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield pathlib.Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise MachineError(f"data.cache_dir = {os.fspath(root)!r}: could not be written: "
                           f"{error}") from error


def _sweep(root: pathlib.Path) -> None:
    """Remove the working folders of processes that were killed, which nobody holds locked."""
    for folder in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # held, or removed by another
            if folder.stat().st_mtime + FRESH_S > time.time():
                continue  # not locked yet, perhaps
            with (folder / "lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def publish(folder: pathlib.Path, target: epath.Path, names: Sequence[str]) -> None:
    """Move files from `folder` into `target` in order, each appearing whole or not at all, also
    where the power fails: what a file holds is on the disk before its name is."""
    if not is_local(target):
        for name in names:
            with refusals(target / name, "written"):
                upload(folder / name, target / name)
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        _to_disk(folder / name)
        os.replace(folder / name, target / name)
        _to_disk(target)


def _to_disk(path: epath.PathLike) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

