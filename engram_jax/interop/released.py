"""The memory of a released model: its hash, its fusion and its tables, and the folder they go to.

    config.json         what it is, and the sha256 of what lies beside it
    hash.json           what it hashes with (`hashing/artifact.py`)
    fusion.safetensors  the weights beside the tables, float32: "LAYER.NAME"
    tables/             a table file for each site (`offload/file.py`)

The folder appears whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.errors import UserError
from engram_jax.hashing import artifact
from engram_jax.hashing.addressing import engram_site
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.hashing.token_hash import TokenHash
from engram_jax.interop import safetensors
from engram_jax.interop.shards import ShardTable
from engram_jax.model.engram import init_engram
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableInfo, TableWriter
from engram_jax.offload.home import Home
from engram_jax.offload.host import HostTable
from engram_jax.settings import from_file
from engram_jax.storage import is_local, refusals

FORMAT, VERSION = "engram_jax memory", 1
SOURCES = ("deepseek-v4.1", "qwen3.8")
HOMES = ("disk", "host")
_SUMMED = (artifact.FILE, "fusion.safetensors")
Weights = dict[str, np.ndarray]
_AT_ONCE = 2**24  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
    """The memory of one model; close it when it is done with.

    Attributes:
      source: one of `SOURCES`: which model's arithmetic it is.
      config: settings of the module, as for our own.
      width, streams: D and M of the hidden states that it reads.
      memory: tokens to rows.
      params: the weights of each layer, float32, as `model.engram.init_engram` has them.
      tables: each layer's home.

    Raises:
      UserError: weights of another shape than the settings say.
    """

    source: str
    config: EngramConfig
    width: int
    streams: int
    memory: TokenHash
    params: Mapping[int, Weights]
    tables: Mapping[int, Home]

    def __post_init__(self) -> None:
        require(self.source in SOURCES, "source", self.source,
                f"must be one of {', '.join(SOURCES)}")
        right = jax.eval_shape(lambda: init_engram(
            jax.random.key(0), self.width, self.config.branches(self.streams), self.config))
        for layer, params in self.params.items():
            for name in sorted(right.keys() | params.keys()):
                shape = params[name].shape if name in params else None
                wanted = right[name].shape if name in right else None
                require(shape == wanted, f"layer {layer}: shape of {name}", shape,
                        f"must be {wanted}")

    @property
    def layers(self) -> tuple[int, ...]:
        return self.config.layers

    def artifact(self) -> HashArtifact:
        """What it hashes with."""
        named = {engram_site(self.config, layer): layer for layer in self.layers}
        return HashArtifact(memories=dict.fromkeys(named, self.memory), layers=named)

    def info(self, layer: int) -> TableInfo:
        """What a layer's table is, as a file."""
        return TableInfo(
            rows=self.memory.hashing.table_rows[layer], dim=self.config.head_dim,
            dtype=self.tables[layer].format.dtype, site=engram_site(self.config, layer),
            hash=self.memory.hashing.constants(), fingerprint=self.memory.fingerprint,
            run=self.source)

    def close(self) -> None:
        """Close the tables."""
        for home in self.tables.values():
            home.close()


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that gets its name when it is whole; what fails leaves nothing.

    Raises:
      UserError: there is something of that name, or it is not on a disk.
      MachineError: it cannot be made.
    """
    require(is_local(out), "out", os.fspath(out), "must be on a local disk")
    path = Path(out).expanduser().absolute()
    require(not path.exists(), "out", str(path), "is there already; choose another name")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with refusals(path, "written"):
            part.mkdir(parents=True)
        yield part
        with refusals(path, "written"):
            part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_released(released: Released, out: str | os.PathLike[str],
                   say: Callable[[str], None] = lambda line: None) -> Path:
    """Stream a released memory into a folder of our own; its path.

    Args:
      released: its tables are read a stretch at a time.
      out: the folder, which must not be there.
      say: told of each table.

    Raises:
      UserError: the folder is there, or is not on a disk.
      MachineError: something cannot be read or written; then there is no folder.
    """
    with whole_folder(out) as folder:
        released.artifact().write(folder / artifact.FILE)
        fusion = {f"{layer}.{name}": value for layer, params in released.params.items()
                  for name, value in params.items()}
        safetensors.save(folder / "fusion.safetensors", fusion)
        for layer, home in released.tables.items():
            info = released.info(layer)
            with TableWriter(folder / "tables" / f"{info.site}.{info.dtype}.table", info) as writer:
                for packed_UB in stretches(home):
                    writer.write(packed_UB)
            say(f"{info.site}: {info.rows:,} rows of {info.dim} columns in {info.dtype}")
        values = {
            "format": FORMAT, "version": VERSION, "source": released.source,
            "width": released.width, "streams": released.streams,
            "engram": dataclasses.asdict(released.config),
            "sha256": {name: _sha256(folder / name)
                       for name in _SUMMED},
        }
        with refusals(folder, "written"):
            (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    return Path(out)


def open_released(folder: str | os.PathLike[str], home: str = "disk") -> Released:
    """The memory in a folder that `write_released` has written.

    Args:
      folder: of the memory.
      home: "disk" reads rows from the files, "host" reads the tables whole into host memory.

    Raises:
      UserError: no such folder, or one that is altered.
      MachineError: something cannot be read.
    """
    require(home in HOMES, "home", home, f"must be one of {', '.join(HOMES)}")
    path = Path(folder).expanduser()
    values = read_json(path / "config.json")
    require((values.get("format"), values.get("version")) == (FORMAT, VERSION),
            f"{path / 'config.json'}: format", (values.get("format"), values.get("version")),
            f"must be {(FORMAT, VERSION)}")
    kinds = {"source": str, "width": int, "streams": int, "engram": dict, "sha256": dict}
    for name, kind in kinds.items():
        require(type(values.get(name)) is kind, f"{path / 'config.json'}: {name}",
                values.get(name), f"must be of type {kind.__name__}")
    config: EngramConfig = from_file(
        path / "config.json", values["engram"], EngramConfig, "engram.")
    require(values["sha256"].keys() == set(_SUMMED), f"{path / 'config.json'}: sha256",
            sorted(values["sha256"]), f"must be of {', '.join(_SUMMED)}")
    for name, digest in values["sha256"].items():
        require(_sha256(path / name) == digest, f"{path / name}: sha256", digest,
                "is not that of the file: it is altered")
    kept = artifact.read_artifact(path / artifact.FILE)
    for layer in config.layers:
        require(kept.layers.get(engram_site(config, layer)) == layer,
                f"{path / artifact.FILE}: layers", sorted(kept.layers.values()),
                f"must be those of config.json, {list(config.layers)}")
    tensors = safetensors.open_tensors(path / "fusion.safetensors")
    params: dict[int, Weights] = {layer: {} for layer in config.layers}
    for name, tensor in tensors.items():
        number, _, field = name.partition(".")
        require(number.isdecimal() and int(number) in params, f"{tensor.path}: tensor", name,
                f"must be LAYER.NAME for one of the layers {config.layers}")
        params[int(number)][field] = tensor.floats()
    with contextlib.ExitStack() as opened:
        tables: dict[int, Home] = {}
        memory = kept.memories[engram_site(config, config.layers[0])]
        for layer in config.layers:
            tables[layer] = _table(path, engram_site(config, layer), memory, home)
            opened.callback(tables[layer].close)
        released = Released(source=values["source"], config=config, width=values["width"],
                            streams=values["streams"], memory=memory, params=params, tables=tables)
        opened.pop_all()
    return released


def _table(path: Path, site: str, memory: TokenHash, home: str) -> Home:
    files = sorted((path / "tables").glob(f"{site}.*.table"))
    require(len(files) == 1, f"{path / 'tables'}: tables of {site}", [f.name for f in files],
            "must be one")
    table = (HostTable.from_file(files[0]) if home == "host"
             else DiskTable.open(files[0], check="read"))
    if table.fingerprint != memory.fingerprint:
        table.close()
        require(False, f"{files[0]}: fingerprint", table.fingerprint,
                f"must be {memory.fingerprint}, of hash.json")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: it is not there, or holds something else.
      MachineError: it cannot be read.
    """
    require(path.is_file(), "config", str(path), "there is no such file")
    with refusals(path, "read"):
        data = path.read_bytes()
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    require(isinstance(values, dict), str(path), type(values).__name__, "must be a JSON object")
    return dict(values)


def stretches(home: Home) -> Iterator[np.ndarray]:
    """All packed rows of a home in order, uint8 [U, B], some megabytes at a time."""
    if isinstance(home, ShardTable):  # which reads neighbours much faster together
        yield from home.stretches()
        return
    at_once = max(1, _AT_ONCE // home.format.row_bytes)
    for start in range(0, home.rows, at_once):
        yield home.lookup(np.arange(start, min(start + at_once, home.rows)))


def _sha256(path: Path) -> str:
    with refusals(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
