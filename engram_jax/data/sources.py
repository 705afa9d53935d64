"""Where text comes from: one small interface over every kind of `data.path`.

    data.path            documents
    "stdlib"             every source file of Python's standard library (a folder of that name
                         is "./stdlib")
    FILE                 the file is one document
    FILE.jsonl, .ndjson  one document a line, in the field data.text_field
    FILE.json            the same, or one array of objects
    FILE.parquet         one document a row
    FOLDER               every file below it, in sorted order, hidden ones left out
    "hf:NAME", "hf:NAME:SPLIT", "hf:NAME:CONFIG:SPLIT"
                         a Hugging Face dataset, one document a row; the split is "train" if unnamed

`data.mixture` mixes several of them. Capitals in a file's suffix do not matter, and gzip and
Zstandard (.gz, .zst) are looked through. Paths may be object storage (`gs://`, `s3://`). A folder
of ready token shards is `tokens.py`'s.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from engram_jax.config import DataConfig
from engram_jax.data import hugging_face, mixtures
from engram_jax.data.reading import Part, Unreadable, decoded
from engram_jax.data.records import Wanted, file_parts
from engram_jax.errors import UserError
from engram_jax.storage import check_readable, is_local, refusals, scheme

# Folders of the standard library that are not its source.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"))
# What stores say of an object that changes whenever it is written.
VERSIONS = ("generation", "etag", "ETag", "md5Hash", "crc32c")


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents that can be read again and again, always the same ones in the same order.

    Attributes:
      path: of a file or folder, or another name.
      setting: the setting that names it, as "data.path = 'x'", for messages.
      read: starts a reading; `parts` and `documents` are the ones to call.
      stamp: what changes when the text does, plain JSON that costs little to find out: sizes and
        times of files, the commit of a data set. None where there is nothing of that kind.
      revision: the commit of a data set on the Hugging Face hub; "" for other sources.
    """

    path: str
    setting: str
    read: Callable[[], Iterator[Part]]
    stamp: Callable[[], Any] = lambda: None
    revision: str = ""

    def parts(self) -> Iterator[Part]:
        """The texts, in order, long ones in parts; those of nothing but white space are left out.

        Raises:
          UserError: text that is not text (binary, not UTF-8, a record without the field).
          MachineError: a file that the machine refuses to read.
        """
        blank: list[Part] = []  # white space at the beginning of a document that may be no more
        begun = False
        with refusals(self.path, "read", self.setting):
            for part in self.read():
                if not begun and (not part.text or part.text.isspace()):
                    blank = [] if part.ends else [*blank, part]
                    continue
                yield from blank
                yield Part(_encodable(part.text), part.ends)
                blank, begun = [], not part.ends

    def documents(self) -> Iterator[str]:
        """The texts, in order, each whole.

        Raises:
          UserError, MachineError: as `parts`.
        """
        waiting: list[str] = []
        for part in self.parts():
            waiting.append(part.text)
            if part.ends:
                yield "".join(waiting)
                waiting = []

    @property
    def amount(self) -> str:
        """How much text there is, in words; reads all of it.

        Raises:
          UserError, MachineError: as `parts`.
        """
        documents = size = 0
        for part in self.parts():
            documents, size = documents + part.ends, size + len(part.text.encode())
        return in_words(documents, size)


def in_words(documents: int, size: int) -> str:
    """An amount of text, for messages; `size` in bytes."""
    return f"{documents:,} documents, {size / 1e6:.1f} MB"


def open_source(config: DataConfig) -> Source:
    """The source that the settings name; nothing but its existence is looked at yet.

    Raises:
      UserError: a path does not exist, a folder holds no documents, or bad shares of a mixture.
    """
    if not config.mixture:
        return _open(config, config.path, f"data.path = {config.path!r}")
    shares = mixtures.parsed_shares(config.mixture)
    sources = [_open(config, share.path, f"data.mixture = {share.path!r}") for share in shares]
    return Source(
        "mixture", "data.mixture",
        lambda: mixtures.mixed([source.parts() for source in sources],
                               [share.weight for share in shares]),
        lambda: mixtures.stamp([source.stamp() for source in sources], shares),
        " ".join(source.revision for source in sources if source.revision))


def _open(config: DataConfig, path: str, setting: str) -> Source:
    wanted = Wanted(setting, config.text_field)
    if path == "stdlib":
        return Source(path, setting, _standard_library,
                      lambda: _stamp("", map(epath.Path, _own_source())))
    if path.startswith(hugging_face.PREFIX):
        rows = hugging_face.Rows.named(path, config.revision, wanted)
        return Source(path, setting, rows.parts, rows.stamp, rows.commit)
    check_readable(path, setting.split(" = ")[0])
    file = epath.Path(path).expanduser()
    with refusals(path, "read", setting):
        if file.is_dir():
            return Source(path, setting, functools.partial(_folder, file, wanted),
                          lambda: _stamp(config.text_field, files_below(file)))
        if not _exists(file):
            raise UserError(f"{setting}: does not exist; name a text file, a folder, a "
                            '.jsonl file, a folder of token shards, "stdlib" or "hf:NAME"')
    return Source(path, setting, functools.partial(file_parts, file, wanted),
                  lambda: _stamp(config.text_field, [file]))


def _exists(file: epath.Path) -> bool:
    """Whether a file is there; other than of `file.exists`, the answer of a store that refuses to
    tell is an error."""
    if is_local(file):
        return file.exists()
    try:
        file.stat()
    except FileNotFoundError:
        return False
    return True


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which JSON can hold and UTF-8 cannot, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _stamp(field: str, files: Iterable[epath.Path]) -> Any:
    """Where files are, their sizes and times or versions, and the field that is read of them; None
    where a store tells neither."""
    stamps: list[Any] = [field]
    for file in files:
        if (version := _version(file)) is None:
            return None
        stamps.append(version)
    return stamps


def _version(file: epath.Path) -> Any:
    if is_local(file):
        status = os.stat(file)
        # The second time is that of the inode: a copy that keeps the first one changes it.
        return [os.path.abspath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    about = importlib.import_module("fsspec").filesystem(scheme(file)).info(os.fspath(file))
    known = {name: str(about[name]) for name in VERSIONS if about.get(name)}
    return [os.fspath(file), about["size"], known] if known else None


# --- The standard library ---


def _own_source() -> list[str]:
    """Files of Python's own source, sorted by path."""
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_FOLDERS]
        paths += [os.path.relpath(os.path.join(folder, name), root)
                  for name in names if name.endswith(".py")]
    return [os.path.join(root, path)
            for path in sorted(paths, key=lambda path: path.split(os.sep))]


def _standard_library() -> Iterator[Part]:
    """Python's own source; files in other encodings are left out."""
    for path in _own_source():
        with contextlib.suppress(Unreadable):
            yield Part(decoded(epath.Path(path).read_bytes()))


# --- Folders ---


def _folder(folder: epath.Path, wanted: Wanted) -> Iterator[Part]:
    file = None
    for file in files_below(folder):
        yield from file_parts(file, wanted)
    if file is None:
        raise UserError(f"{wanted.setting}: the folder holds no documents; put text or .jsonl "
                        "files into it")


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file below a folder, in sorted order, hidden ones left out.

    Links are followed. A folder that several paths lead to is read once, by the first of them in
    the order: a folder may hold a link to itself.
    """
    seen, waiting = {_identity(folder)}, [folder]
    while waiting:
        path = waiting.pop()
        if path != folder and not path.is_dir():
            yield path
            continue
        if path != folder:
            if _identity(path) in seen:
                continue
            seen.add(_identity(path))
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        waiting += sorted(entries, key=lambda entry: entry.name, reverse=True)


def _identity(folder: epath.Path) -> Any:
    """Equal for two paths to one folder."""
    if not is_local(folder):
        return os.fspath(folder)
    status = os.stat(folder)
    assert stat.S_ISDIR(status.st_mode)
    return status.st_dev, status.st_ino
