"""The digests of a checkpoint's files, written beside them when it is whole.

    digests.json    {"files": {"state/d/...": [bytes, sha256 in hex], ...}}

A checkpoint of an older version has none, and is taken as it is.
"""

import hashlib
from collections.abc import Iterator

from etils import epath

from engram_jax.errors import UserError
from engram_jax.settings import json_text
from engram_jax.storage import read_json, refusals, write_text

FILE = "digests.json"
READ_AT_ONCE = 4 * 2**20  # bytes


def write_digests(folder: epath.Path) -> None:
    """Read every file of a checkpoint and write what it is known by.

    Raises:
      MachineError: something cannot be read or written.
    """
    sums = {name: _digest(folder / name) for name in sorted(_files(folder))}
    write_text(folder / FILE, json_text({"files": sums}, indent=0) + "\n")


def has_digests(folder: epath.Path) -> bool:
    """Whether a checkpoint was whole once."""
    return (folder / FILE).exists()


def damage(folder: epath.Path) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each.

    Nothing is said of a checkpoint without digests. Of others every file is read. A path that
    digests.json names is compared and never opened.

    Raises:
      MachineError: a file cannot be read.
    """
    if not has_digests(folder):
        return []
    try:
        wanted = read_json(folder / FILE).get("files")
    except UserError as error:
        return [str(error)]
    if not isinstance(wanted, dict):
        return [f"{folder / FILE}: files = {wanted!r}: must be an object with fields"]
    there = set(_files(folder))
    lines = [f"{folder}: {name} is missing" for name in sorted(wanted.keys() - there)]
    for name in sorted(there & wanted.keys()):
        size, digest = _digest(folder / name)
        if wanted[name] != [size, digest]:
            lines.append(f"{folder / name}: is not what was written ({size:,} bytes, sha256 "
                         f"{digest:.8}, was {_described(wanted[name])})")
    return lines + [f"{folder / name}: was not written with it" for name in sorted(
        there - wanted.keys())]


def _described(wanted: object) -> str:
    match wanted:
        case [int(size), str(digest)]:
            return f"{size:,} bytes, {digest[:8]}"
    return repr(wanted)


def _files(folder: epath.Path, above: str = "") -> Iterator[str]:
    """The names of all files but the digests', relative to the checkpoint."""
    with refusals(folder, "read"):
        entries = list(folder.iterdir())
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry, f"{above}{entry.name}/")
        elif above or entry.name != FILE:
            yield above + entry.name


def _digest(path: epath.Path) -> tuple[int, str]:
    """Bytes of a file, and the sha256 of them."""
    size, digest = 0, hashlib.sha256()
    with refusals(path, "read"), path.open("rb") as file:
        while block := file.read(READ_AT_ONCE):
            size += len(block)
            digest.update(block)
    return size, digest.hexdigest()
