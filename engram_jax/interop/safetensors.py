"""Safetensors files read where their rows lie, and written a stretch at a time.

    0       uint64 bytes of the header
    8       the header: JSON, for each tensor its dtype, shape and [start, stop) in the data
    data    all tensors end to end

The format's own library maps a file or loads it, and writes what it is handed whole; a table of a
hundred gigabytes wants neither. Nothing here is ever unpickled.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from engram_jax.config import require
from engram_jax.errors import MachineError, UserError
from engram_jax.storage import WholeFile, is_local, refusals

INDEX = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": np.uint8,
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
_LARGEST_HEADER = 100_000_000  # bytes, as the format's own library has it
_AT_ONCE = 2**24  # bytes
_MOST_AXES = 32  # that every NumPy takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
      name, dtype, shape: as the header has them; a dtype is one of `DTYPES`.
      path: of its file.
      start: of its bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of what one number of the first axis leads to."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """The tensor whole; e8m0 as the bytes that it is.

        Raises:
          MachineError: it cannot be read.
        """
        data = np.empty(self.nbytes, np.uint8)
        with refusals(self.path, "read"), self.path.open("rb", buffering=0) as file:
            read_at(file.fileno(), self.start, data, self.path)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)

    def floats(self) -> np.ndarray:
        """The tensor whole, in float32.

        Raises:
          UserError: it does not hold floats.
          MachineError: it cannot be read.
        """
        require(self.dtype in FLOATS, f"{self.path}: {self.name}: dtype", self.dtype,
                f"must be one of {', '.join(FLOATS)}")
        return self.read().astype(np.float32)

    def require_shape(self, *shape: int) -> None:
        """Refuse another shape (UserError)."""
        require(self.shape == shape, f"{self.path}: {self.name}: shape", self.shape,
                f"must be {shape}")


def read_at(file: int, offset: int, out: np.ndarray, path: Path) -> None:
    """Fill `out`, contiguous uint8, with the bytes of an open file from `offset` on.

    Raises:
      MachineError: there are not so many.
    """
    view = out.reshape(-1).data
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise MachineError(f"{path}: ended while it was read")
        view, offset = view[count:], offset + count


class Tensors(Mapping[str, Tensor]):
    """All tensors of a checkpoint, by name; made by `open_tensors`.

    Attributes:
      metadata: strings that the first file carries of itself.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path):
        self._tensors, self.metadata, self._where = dict(tensors), dict(metadata), where

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"{self._where}: holds no tensor {name!r}")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a file, or of a folder of shards with or without an index; reads headers only.

    Raises:
      UserError: no safetensors, a header that promises what the file does not hold, an unknown
        dtype, a shard that the index names and that is missing.
      MachineError: a file cannot be read.
    """
    require(is_local(path), "checkpoint", os.fspath(path), "must be on a local disk")
    where = Path(path).expanduser()
    require(where.exists(), "checkpoint", os.fspath(path), "there is no such file or folder")
    if where.is_file():
        tensors, metadata = _header(where)
        return Tensors(tensors, metadata, where)
    named = _indexed(where / INDEX) if (where / INDEX).exists() else None
    files = (sorted(where.glob("*.safetensors")) if named is None
             else sorted({where / file for file in named.values()}))
    if not files:
        pickles = [p.name for p in sorted(where.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        raise UserError(f"{where}: holds no safetensors" + (
            f"; {pickles[0]} is a pickle, which runs whatever it holds: convert it where it was "
            "made" if pickles else ""))
    tensors, metadata = {}, {}
    for number, file in enumerate(files):
        with refusals(file, "read"):
            there = file.is_file()
        if not there:
            raise UserError(f"{where / INDEX}: names {file.name}, which is missing")
        own, said = _header(file)
        if number == 0:
            metadata = said
        if twice := tensors.keys() & own.keys():
            raise UserError(f"{file}: holds {min(twice)!r}, which another shard holds, too")
        tensors.update(own)
    for name, shard in (named or {}).items():
        if name not in tensors or tensors[name].path.name != shard:
            raise UserError(f"{where / INDEX}: says that {name!r} is in {shard}; it is not")
    return Tensors(tensors, metadata, where)


def _indexed(path: Path) -> dict[str, str]:
    """The index: the name of a tensor to that of its file, which lies beside the index."""
    with refusals(path, "read"):
        data = path.read_bytes()
    try:
        named = json.loads(data, object_pairs_hook=_each_once)["weight_map"]
        right = all(isinstance(word, str) for word in (*named, *named.values()))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: is no index of shards ({error!r})") from error
    require(right and bool(named), f"{path}: weight_map", type(named).__name__,
            "must give each tensor its file")
    for file in named.values():
        require(Path(file).name == file and file not in ("", ".", ".."), f"{path}: file", file,
                "must be a file beside the index")
    return dict(named)


def _header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file."""
    with refusals(path, "read"), path.open("rb") as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            if start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
                raise UserError(f"{path}: is a pickle and no safetensors; a pickle runs whatever "
                                "it holds: convert it where it was made")
            raise UserError(f"{path}: is no safetensors: a header of {length} bytes in a file of "
                            f"{size}")
        text = file.read(length)
    try:
        items = dict(json.loads(text, object_pairs_hook=_each_once).items())
        metadata = dict(items.pop("__metadata__", None) or {})
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its header is no JSON object ({error})") from error
    tensors = {name: _tensor(path, name, value, 8 + length) for name, value in items.items()}
    _require_tiled(path, list(tensors.values()), 8 + length, size)
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a ValueError for a name that it has twice (JSON takes the last)."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} stands there twice")
        fields[name] = value
    return fields


def _tensor(path: Path, name: str, value: Any, data_start: int) -> Tensor:
    what = f"{path}: {name}"
    require(isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}, what,
            value, "must have dtype, shape and data_offsets")
    require(value["dtype"] in DTYPES if isinstance(value["dtype"], str) else False,
            f"{what}: dtype", value["dtype"], f"must be one of {', '.join(DTYPES)}")
    for field, least in (("shape", 0), ("data_offsets", 0)):
        require(isinstance(value[field], list) and all(
            type(number) is int and number >= least for number in value[field]),
            f"{what}: {field}", value[field], "must be whole numbers from 0 on")
    offsets = value["data_offsets"]
    require(len(offsets) == 2, f"{what}: data_offsets", offsets, "must be [start, stop]")
    tensor = Tensor(name=name, dtype=value["dtype"], shape=tuple(value["shape"]), path=path,
                    start=data_start + offsets[0])
    require(offsets[1] - offsets[0] == tensor.nbytes, f"{what}: data_offsets", offsets,
            f"a tensor {list(tensor.shape)} of {tensor.dtype} has {tensor.nbytes} bytes")
    # An axis of 0 hides how large the others are.
    spread = math.prod(max(number, 1) for number in tensor.shape)
    require(len(tensor.shape) <= _MOST_AXES and spread < 2**60, f"{what}: shape", value["shape"],
            f"must be at most {_MOST_AXES} axes, of less than 2**60 values")
    return tensor


def _require_tiled(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    """Refuse tensors that overlap, leave a hole, or go past the file's end."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != start:
            raise UserError(f"{path}: {tensor.name}: begins at byte {tensor.start}, the tensor "
                            f"before it ends at {start}")
        start += tensor.nbytes
    if start != size:
        cut = "cut short" if size < start else "too long"
        raise UserError(f"{path}: has {size} bytes, its header promises {start}: it is {cut}")


class Writer(WholeFile):
    """Writes one file, tensor after tensor; it appears whole or not at all.

    Use as a context manager; leaving it with an exception leaves no file.

    Args:
      path: of the file, on a disk.
      tensors: the name of each to (dtype, shape), in the order in which they are written.
      metadata: strings to carry.

    Attributes:
      sha256: hex, of the file, once it is finished.

    Raises:
      MachineError: the file cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]],
                 metadata: Mapping[str, str] | None = None):
        fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        stop = 0
        for name, (dtype, shape) in tensors.items():
            start, stop = stop, stop + math.prod(shape) * DTYPES[dtype].itemsize
            fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        header = json.dumps(fields, separators=(",", ":")).encode()
        header = header.ljust(-(-len(header) // 8) * 8)
        self.sha256 = ""
        self._left, self._sum = stop, hashlib.sha256()
        with refusals(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path)
        try:
            self.put(struct.pack("<Q", len(header)) + header)
        except BaseException:
            self.discard()
            raise

    def write(self, array: np.ndarray) -> None:
        """Append the bytes of an array: the next of a tensor, or of the one after it.

        Raises:
          MachineError: the disk refuses them.
        """
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        assert data.size <= self._left, "more than the header promises"
        self._left -= data.size
        for start in range(0, data.size, _AT_ONCE):
            self.put(data[start:start + _AT_ONCE].data)

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._sum.update(data)
        super().put(data)

    def finish(self) -> None:
        """Put the file in its place."""
        assert self._left == 0, "less than the header promises"
        super().finish()
        self.sha256 = self._sum.hexdigest()


def save(path: Path, arrays: Mapping[str, np.ndarray],
         metadata: Mapping[str, str] | None = None) -> str:
    """Write arrays that are in memory to one file; its sha256.

    Raises:
      MachineError: it cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}  # the last one: bytes are U8
    tensors = {name: (names[array.dtype], array.shape) for name, array in arrays.items()}
    with Writer(path, tensors, metadata) as writer:
        for array in arrays.values():
            writer.write(array)
    return writer.sha256
