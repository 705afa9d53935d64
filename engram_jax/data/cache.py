"""The folder that keeps what is made from text once: trained tokenizers and token shards."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence

from etils import epath

from engram_jax.config import DataConfig
from engram_jax.errors import MachineError
from engram_jax.storage import check_readable, is_local, refusals, upload

FORMAT = 1  # raise it when the same text would be trained on or packed differently


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
        folder = tempfile.mkdtemp(prefix=".making-", dir=root if is_local(root) else None)
        try:
            yield pathlib.Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise MachineError(f"data.cache_dir = {os.fspath(root)!r}: could not be written: "
                           f"{error}") from error


def publish(folder: pathlib.Path, target: epath.Path, names: Sequence[str]) -> None:
    """Move files from `folder` into `target` in order, each appearing whole or not at all."""
    if not is_local(target):
        for name in names:
            with refusals(target / name, "written"):
                upload(folder / name, target / name)
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.replace(folder / name, target / name)

