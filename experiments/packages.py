"""Write a text so large that no run of `tokens` reads any of it twice: source code of packages.

    python -m experiments.packages FILE.jsonl

The documents are the source files of Python's standard library and of every package that
experiments/packages.txt names, in the order of their paths, no two the same; a line of JSON each
with path and text. Beside it FILE.jsonl.json says what went in. The same Python and the same
versions give the same bytes, and their digest is compared with the committed results' text.
"""

import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_jax.config import DataConfig, require
from engram_jax.data.sources import open_source
from engram_jax.errors import UserError

PINS = Path(__file__).with_name("packages.txt")
SHA256 = "cd2646db46422655a69e167d176deba51b9595218d7267e3c79323dc56aa8d21"  # committed results'


def pinned(pins: Path = PINS) -> dict[str, str]:
    """name -> version of the packages of a list of NAME==VERSION, one of which may be python.

    Raises:
      UserError: any is not here, or is here in another version.
    """
    versions, missing = {}, []
    for line in pins.read_text().splitlines():
        if not (pin := line.partition("#")[0].strip()):
            continue
        name, _, wanted = pin.partition("==")
        there = _version(name)
        if name == "python":
            require(there == wanted, name, there, f"is not what {pins.name} names, {wanted}")
            continue
        versions[name] = wanted
        if there != wanted:
            missing.append(pin)
    if missing:
        raise UserError(f"{', '.join(missing)}: not here, or in another version; "
                        f"python -m pip install --no-deps {' '.join(missing)}")
    return dict(sorted(versions.items()))


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def documents(versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(path, text) of every source file, no text twice; those that are not UTF-8 are left out."""
    met = set()
    for path, text in _files(versions):
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in met:
            met.add(digest)
            yield path, text


def _files(versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(open_source(DataConfig(path="stdlib")).documents()):
        yield f"stdlib/{number:04}", text
    for name in versions:
        distribution = importlib.metadata.distribution(name)
        for file in sorted(distribution.files or (), key=lambda file: file.parts):
            if file.suffix != ".py" or ".." in file.parts:
                continue
            try:
                text = Path(str(distribution.locate_file(file))).read_bytes().decode()
            except UnicodeDecodeError:
                continue
            yield f"{name}/{file.as_posix()}", text


def write(out: Path, pins: Path = PINS) -> dict[str, Any]:
    """Write the text and its record, and return the record."""
    versions, whole = pinned(pins), hashlib.sha256()
    count = size = 0
    with out.open("wb") as file:
        for path, text in documents(versions):
            line = json.dumps({"path": path, "text": text}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            whole.update(line)
            count, size = count + 1, size + len(text.encode())
    record = {"sha256": whole.hexdigest(), "documents": count, "bytes": size,
              "python": platform.python_version(), "packages": versions}
    out.with_name(f"{out.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main(words: list[str]) -> int:
    """Write the text that the command line names."""
    if len(words) != 1 or not words[0].endswith(".jsonl"):
        print("python -m experiments.packages FILE.jsonl", file=sys.stderr)
        return 2
    try:
        record = write(Path(words[0]))
    except (UserError, OSError) as error:
        print(f"experiments.packages: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"{record['documents']:,} documents, {record['bytes'] / 1e6:.1f} MB, "
          f"sha256 {record['sha256']}")
    if record["sha256"] != SHA256:
        print(f"experiments.packages: not the text of the committed results, sha256 {SHA256}",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
