"""A trained run as safetensors for anybody, and back: `engram-jax export`, `engram-jax import`.

    config.json                         the run's config and the step of the checkpoint
    hash.json, tokenizer.json           what it hashes with, and its tokenizer
    model-00001-of-0000N.safetensors    params.PATH and router_bias.N; then tables.SITE.part_I, the
                                        rows in the order of their ids
    model.safetensors.index.json        which tensor is in which file
    SHA256SUMS                          of all of these, as `sha256sum -c` reads it

A table is streamed: no more than a stretch of it is in memory on the way out.
Shapes: S shards, R rows of a shard, D columns, U rows.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from engram_jax.config import RunConfig, require
from engram_jax.errors import UserError
from engram_jax.hashing.artifact import FILE as HASH_FILE
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.interop.released import read_json, stretches, whole_folder
from engram_jax.interop.safetensors import INDEX, Tensors, Writer, open_tensors
from engram_jax.interop.shards import Part, ShardTable
from engram_jax.offload.formats import RowFormat
from engram_jax.runs.checkpoints import Checkpoints, last_checkpoint
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.export import SavedTables
from engram_jax.runs.reader import Reader, open_reader, reader_of
from engram_jax.settings import from_file, to_dict
from engram_jax.storage import refusals
from engram_jax.tables.layout import layout_of
from engram_jax.training.placement import placed_state, single_mesh
from engram_jax.training.state import TrainState, abstract_state, init_state

FORMAT, VERSION = "engram_jax run", 1
SHARD_BYTES = 4_500_000_000
SUMS = "SHA256SUMS"
_READ = (INDEX, "config.json", "tokenizer.json", HASH_FILE, "result.json")
_KEPT = ("params", "router_bias")
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class _File:
    """One file of an export: its tensors, and what writes their bytes."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    pieces: Iterator[np.ndarray]


def export_run(directory: epath.PathLike, out: str | os.PathLike[str],
               say: Callable[[str], None] = lambda line: None,
               shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a run's last checkpoint, without its optimizer, to a folder; its path.

    Args:
      directory: of the run.
      out: the folder, which must not be there.
      say: told of each file.
      shard_bytes: what a file holds at most, or one tensor of the model if that is larger.

    Raises:
      UserError: no run, no checkpoint, or the folder is there.
      MachineError: something cannot be read or written; then there is no folder.
    """
    records = RunDirectory(directory)
    run, reader = records.config(), reader_of(records)
    saved = SavedTables(records, reader)
    with last_checkpoint(records, reader) as checkpoints:
        state = checkpoints.restore(
            placed_state(run, single_mesh()), step=saved.step, only=_KEPT)
    with whole_folder(out) as folder:
        files = [*_of_model(state, shard_bytes), *_of_tables(saved, shard_bytes)]
        sums, named = {}, {}
        for number, file in enumerate(files, 1):
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
            with Writer(folder / name, file.tensors, {"format": "pt"}) as writer:
                for piece in file.pieces:
                    writer.write(piece)
            sums[name] = writer.sha256
            named.update(dict.fromkeys(file.tensors, name))
            say(f"{name}: {', '.join([*file.tensors][:3])}{' ...' * (len(file.tensors) > 3)}")
        texts = {
            INDEX: json.dumps({"metadata": {}, "weight_map": named}, indent=1),
            "config.json": json.dumps({"format": FORMAT, "version": VERSION, "step": saved.step,
                                       "config": to_dict(run)}, indent=1),
            "tokenizer.json": reader.tokenizer.to_str(),
            HASH_FILE: HashArtifact.of(reader.addressing).to_json()}
        if (result := records.result()) is not None:
            texts["result.json"] = json.dumps(result, indent=1)
        for name, text in texts.items():
            sums[name] = _write(folder / name, text)
        _write(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return Path(out)


def _write(path: Path, text: str) -> str:
    """Write a text; its sha256."""
    with refusals(path, "written"):
        path.write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def _of_model(state: TrainState, shard_bytes: int) -> list[_File]:
    """The files of the parameters, in the order of their names."""
    arrays = {name: np.asarray(leaf) for field in _KEPT
              for name, leaf in _leaves(getattr(state, field), field).items()}
    groups: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, array in arrays.items():
        if groups[-1] and filled + array.nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = array
        filled += array.nbytes
    return [_File({name: ("F32", array.shape) for name, array in group.items()},
                  iter(group.values())) for group in groups]


def _of_tables(saved: SavedTables, shard_bytes: int) -> Iterator[_File]:
    """A file for each part of each table; their rows are to be written in this order."""
    for site in saved.sites:
        dtype = site.hash_config.table_dtype
        at_once = max(1, shard_bytes // saved.info(site, dtype).format.row_bytes)
        rows = _Rows(saved.packed(site, dtype))
        for number, start in enumerate(range(0, site.rows, at_once)):
            count = min(at_once, site.rows - start)
            yield _File({f"tables.{site.name}.part_{number}": (_DTYPES[dtype], (count, site.dim))},
                        rows.take(count))


class _Rows:
    """Packed rows as they come, handed out in other portions."""

    def __init__(self, source: Iterator[tuple[int, np.ndarray]]):
        self._source = source
        self._left: np.ndarray | None = None

    def take(self, count: int) -> Iterator[np.ndarray]:
        """The next `count` rows, uint8 [U, B], a stretch at a time."""
        while count:
            packed_UB = next(self._source)[1] if self._left is None else self._left
            self._left = packed_UB[count:] if len(packed_UB) > count else None
            yield packed_UB[:count]
            count -= min(count, len(packed_UB))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A run in safetensors, opened.

    Attributes:
      folder: where it is.
      run, step: its config, and how far it was trained.
      artifact: what it hashes with.
      tensors: all of them, by name.
      tables: for each site, a home in the shards; to be closed.
    """

    folder: Path
    run: RunConfig
    step: int
    artifact: HashArtifact
    tensors: Tensors
    tables: dict[str, ShardTable]

    def model(self) -> dict[str, Any]:
        """`params` and `router_bias` as a checkpoint has them, NumPy arrays.

        Raises:
          UserError: a tensor that is missing, or of another shape than the config says.
          MachineError: it cannot be read.
        """
        abstract = abstract_state(self.run)

        def leaf(name: str, right: jax.ShapeDtypeStruct) -> np.ndarray:
            tensor = self.tensors[name]
            tensor.require_shape(*right.shape)
            return tensor.floats()

        return {field: jax.tree.unflatten(
            jax.tree.structure(getattr(abstract, field)),
            [leaf(name, right) for name, right in _leaves(
                getattr(abstract, field), field).items()]) for field in _KEPT}

    def __enter__(self) -> "Exported":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the tables."""
        for table in self.tables.values():
            table.close()


def open_export(folder: str | os.PathLike[str]) -> Exported:
    """Open what `export_run` has written, all of it checked against its sums.

    Raises:
      UserError: no such folder, a file that is altered or missing, or a field that is wrong.
      MachineError: something cannot be read.
    """
    path = Path(folder).expanduser()
    _check_sums(path)
    values = read_json(path / "config.json")
    require((values.get("format"), values.get("version")) == (FORMAT, VERSION),
            f"{path / 'config.json'}: format", (values.get("format"), values.get("version")),
            f"must be {(FORMAT, VERSION)}")
    require(type(values.get("step")) is int and 0 <= values["step"] < 2**31
            and isinstance(values.get("config"), dict), f"{path / 'config.json'}: step",
            values.get("step"), "must be a step of training, beside config")
    run: RunConfig = from_file(path / "config.json", values["config"])
    records = RunDirectory(path)
    kept = records.artifact()
    require(kept is not None, f"{path / HASH_FILE}", None, "is missing")
    assert kept is not None
    tensors, tables = open_tensors(path), {}
    for site in kept.addressing(run.model).sites:
        parts, number = [], 0
        while (name := f"tables.{site.name}.part_{number}") in tensors:
            parts.append(Part(tensors[name]))
            number += 1
        require(sum(part.weight.shape[0] for part in parts) == site.rows,
                f"{path}: rows of tables.{site.name}", sum(
                    part.weight.shape[0] for part in parts), f"the primes sum to {site.rows}")
        right = RowFormat(site.hash_config.table_dtype, site.dim)
        for part in parts:
            require(part.format == right, f"{path}: rows of {part.weight.name}", part.format,
                    f"must be {right}, the config's")
        tables[site.name] = ShardTable(parts, site.rows, kept.memories[site.name].fingerprint)
    return Exported(folder=path, run=run, step=values["step"], artifact=kept, tensors=tensors,
                    tables=tables)


def _check_sums(path: Path) -> None:
    sums = path / SUMS
    require(sums.is_file(), "export", str(path), f"holds no {SUMS}, so it is no export of a run")
    with refusals(sums, "read"):
        lines = sums.read_bytes().decode(errors="replace").splitlines()
    named = {line.partition("  ")[2] for line in lines}
    for file in sorted(path.iterdir()):
        require(file.name in named or not (file.name in _READ or file.suffix == ".safetensors"),
                f"{sums}: sum of", file.name, "is missing")
    for line in lines:
        digest, _, name = line.partition("  ")
        file = path / name
        require(Path(name).name == name and file.is_file(), f"{sums}: file", name, "is missing")
        with refusals(file, "read"), file.open("rb") as opened:
            right = hashlib.file_digest(opened, "sha256").hexdigest() == digest
        if not right:
            raise UserError(f"{file}: is altered: its sha256 is not the one in {SUMS}")


def import_run(folder: str | os.PathLike[str], out: str | os.PathLike[str],
               say: Callable[[str], None] = lambda line: None) -> Path:
    """Make a run's folder of an export, with a checkpoint that every command reads; its path.

    The optimizer begins anew and the place in the text is not kept: such a run is served, looked
    into and begun from, not gone on with. Its tables pass through memory.

    Args:
      folder: that `export_run` has written.
      out: the run's folder, which must not be there.
      say: told of each table.

    Raises:
      UserError: as `open_export`, or the folder is there.
      MachineError: something cannot be read or written; then there is no folder.
    """
    exported = open_export(folder)
    run, records = exported.run, RunDirectory(exported.folder)
    reader = open_reader(run, records.tokenizer(), exported.artifact)
    state = jax.jit(lambda: init_state(run))()
    tables = {}
    for site in reader.addressing.sites:
        say(f"{site.name}: {site.rows:,} rows of {site.dim} columns")
        tables[site.name] = jax.numpy.asarray(_table(
            exported.tables[site.name], layout_of(site).shape, state.tables[site.name].dtype))
    state = dataclasses.replace(state, **jax.tree.map(jax.numpy.asarray, exported.model()),
                                tables=tables, step=jax.numpy.int32(exported.step))
    exported.close()
    with whole_folder(out) as path:
        write_records(path, run, reader, records.result())
        with Checkpoints(RunDirectory(path).checkpoints, 1, reader.fingerprints()) as checkpoints:
            checkpoints.save(exported.step, state, NoPlace())
            checkpoints.wait()
    return Path(out)


def write_records(path: Path, run: RunConfig, reader: Reader, result: dict[str, Any] | None
                  ) -> None:
    """Write what stands beside the checkpoints of a run: config, tokenizer, hash, result."""
    _write(path / "config.json", json.dumps(to_dict(run), indent=1, sort_keys=True) + "\n")
    _write(path / "tokenizer.json", reader.tokenizer.to_str())
    kept = HashArtifact.of(reader.addressing)
    if kept.memories:
        kept.write(path / HASH_FILE)
    if result is not None:
        _write(path / "result.json", json.dumps(result, indent=1, sort_keys=True) + "\n")


class NoPlace:
    """Stands for an iterator over text, of which an export has no place."""

    def get_state(self) -> dict[str, int]:
        return {"imported": 1}


def _table(home: ShardTable, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """The table [S, R, D] as training has it: row r at (r mod S, r div S), padding zero."""
    table_SRD, start = np.zeros(shape, dtype), 0
    for packed_UB in stretches(home):
        ids_U = np.arange(start, start + len(packed_UB))
        table_SRD[ids_U % shape[0], ids_U // shape[0]] = packed_UB.view(dtype)
        start += len(packed_UB)
    return table_SRD


def _leaves(tree: Any, field: str) -> dict[str, Any]:
    """Leaves by their dotted path, which begins with `field`; the same for any container."""
    return {".".join([field, *(str(getattr(key, "key", getattr(key, "idx", key)))
                               for key in path)]): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
