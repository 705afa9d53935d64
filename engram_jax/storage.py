"""Files on a disk or in object storage (`gs://`, `s3://`), by way of `etils.epath`.

An object appears whole or not at all, is never appended to, and renaming one copies it: what is
moved into place on a disk is written in place there.
"""

import contextlib
import fcntl
import importlib
import json
import os
import pathlib
import secrets
import shutil
import typing
from collections.abc import Iterator

import fsspec.config
from etils import epath

from engram_jax.errors import MachineError, UserError

PACKAGES = {"gs": "gcs", "s3": "s3"}  # a scheme's extra of this package
COPIED_AT_ONCE = 16 * 2**20  # bytes
LARGEST_JSON = 64 * 2**20  # bytes of a file that is read as one JSON object
READS = 3  # of an object that another process rewrites: `epath` may give a part of it

# A library that has listed a folder would answer from that list for good, whatever others write.
for _kind in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_kind, {}).setdefault("use_listings_cache", False)


def scheme(path: epath.PathLike) -> str:
    """"gs", "s3" and so on; "" for a disk."""
    before, sign, _ = os.fspath(path).partition("://")
    return before if sign else ""


def is_local(path: epath.PathLike) -> bool:
    """Whether `path` is on a disk and not in object storage."""
    return not scheme(path)


def check_readable(path: epath.PathLike, field: str) -> None:
    """Refuse object storage whose library is not there.

    Args:
      path: what the user wrote in `field`.

    Raises:
      UserError: a scheme that nothing can read, or whose library is not installed.
    """
    kind = scheme(path)
    if not kind:
        return
    if kind not in PACKAGES:
        raise UserError(f"{field} = {os.fspath(path)!r}: must be on a disk, gs:// or s3://")
    try:
        importlib.import_module("fsspec").get_filesystem_class(kind)
    except ImportError as error:
        raise UserError(f"{field} = {os.fspath(path)!r}: needs `pip install "
                        f"'engram_jax[{PACKAGES[kind]}]'`") from error


@contextlib.contextmanager
def refusals(path: epath.PathLike, done: str, name: str = "") -> Iterator[None]:
    """What a disk or an object store refuses, as one line: "PATH: could not be `done` (why)".

    Args:
      path: what is read or written.
      done: "read" or "written".
      name: what stands in the place of PATH, for a setting that the user wrote.

    Raises:
      MachineError: it refuses something.
    """
    try:
        yield
    except OSError as error:
        # A setting may name a folder; the error then says which file in it.
        why = str(error) if name else error.strerror or first_line(error)
        raise MachineError(f"{name or os.fspath(path)}: could not be {done} ({why})") from error
    except (MachineError, UserError):
        raise
    except Exception as error:  # of the libraries behind gs:// and s3://: no common base
        if is_local(path):
            raise
        raise MachineError(f"{name or os.fspath(path)}: could not be {done} "
                           f"({first_line(error)})") from error


def write_text(path: epath.Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Replace a file whole: a reader on this disk sees the old one or the new.

    Raises:
      MachineError: it cannot be written.
    """
    with refusals(path, "written"):
        if not is_local(path):
            path.write_bytes(data)
            return
    with WholeFile(pathlib.Path(path)) as file:
        file.put(data)


@contextlib.contextmanager
def one_after_another(folder: epath.Path) -> Iterator[None]:
    """What processes of this machine do to files of a folder within, they do one at a time.

    In object storage, and on a file system without such locks, they do it all the same.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if is_local(folder):
                opened = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, opened)
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield


class WholeFile:
    """A file of this disk that is written a piece at a time, and appears whole or not at all.

    Use as a context manager; leaving it with an exception leaves what stood there before. Of
    several processes that write the same, each has a part of its own.

    Raises:
      MachineError: it cannot be written, for example because the disk is full.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        with refusals(path, "written"):
            self._file = self._part.open("wb", buffering=0)

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.discard()

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        left = memoryview(data)
        with refusals(self.path, "written"):
            while left:
                left = left[self._file.write(left):]

    def finish(self) -> None:
        """Put the file in its place, where it survives a power cut."""
        with refusals(self.path, "written"):
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self.path)
            keep(self.path.parent)

    def discard(self) -> None:
        """Remove what is not in its place."""
        self._file.close()
        self._part.unlink(missing_ok=True)


def keep(path: os.PathLike[str]) -> None:
    """Wait until a local file, or the list of a local folder's files, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: epath.Path) -> dict[str, typing.Any]:
    """The JSON object that a file holds.

    Raises:
      UserError: it is empty, damaged or something else.
      MachineError: it cannot be read.
    """
    for _ in range(0 if is_local(path) else READS - 1):
        with contextlib.suppress(UserError):
            return _read_json(path)
    return _read_json(path)


def _read_json(path: epath.Path) -> dict[str, typing.Any]:
    with refusals(path, "read"):
        size = path.stat().length
        if size > LARGEST_JSON:
            raise UserError(f"{path}: has {size:,} bytes; at most {LARGEST_JSON:,} are read")
        data = path.read_bytes()
    if not data.strip(b" \t\r\n\0"):
        raise UserError(f"{path}: is empty")
    try:
        values = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold an object with fields")
    return values


def _no_number(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is no number")


def upload(file: pathlib.Path, target: epath.Path) -> None:
    """Copy a file of this disk to `target`, a piece at a time."""
    with file.open("rb") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, COPIED_AT_ONCE)


def download(path: epath.Path, target: pathlib.Path) -> None:
    """Copy `path` to `target` on this disk, where it appears whole.

    Raises:
      MachineError: it cannot be read, or the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with refusals(path, "copied to this disk"), path.open("rb") as source, \
            WholeFile(target) as file:
        while piece := source.read(COPIED_AT_ONCE):
            file.put(piece)


def first_line(error: BaseException) -> str:
    """One line that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
