"""One table in one file: a header, packed rows in the order of their ids, a checksum per block.

    0           "ENGTABLE", uint32 version, uint32 bytes of the text
    16          the text: JSON, the fields of `TableInfo`; zeros up to a multiple of 4096
    data_start  R rows of B bytes, each with its scales: one read brings both
    trailer     uint32 CRC-32 of each block of rows; then one of the header and these checksums

All little-endian. Header and trailer are all that opening reads, so it does not take longer for a
larger file; a file cut short has the wrong size, and one changed elsewhere fails its block's check.

Shapes: R rows of the table, U rows, B bytes of a packed row, K blocks.
"""

import dataclasses
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engram_jax.config import MAX_TABLE_ROWS, require
from engram_jax.errors import MachineError, UserError
from engram_jax.hashing.addressing import Addressing
from engram_jax.offload.formats import RowFormat
from engram_jax.storage import WholeFile, is_local, refusals

MAGIC, VERSION = b"ENGTABLE", 1
BLOCK_BYTES = 16 * 1024  # about; whole rows
_START = struct.Struct("<8sII")
_PAGE = 4096
_MOST_COLUMNS = 2**24
_LARGEST_HEADER = 2**24  # bytes; more means that the file is not what it says
_READ_AT_ONCE = 2**24  # bytes
_AGAIN = "export it again, or write it again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableInfo:
    """Says what a table is: enough to read its rows, and to refuse it for another hash.

    Attributes:
      rows, dim, dtype: its size and the format of its rows.
      site: its name in the model.
      hash: `NgramHash.constants()`.
      fingerprint: of hash and vocabulary, as in `Addressing.fingerprints`.
      run: the name of the run that it comes from.
      step, saved_ns: of the checkpoint: its step, and when it was saved, in ns since 1970.

    Raises:
      UserError: a field of another type, or out of range.
    """

    rows: int
    dim: int
    dtype: str
    site: str
    hash: Mapping[str, Any]
    fingerprint: str
    run: str = ""
    step: int = 0
    saved_ns: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("rows", 1, MAX_TABLE_ROWS), ("dim", 1, _MOST_COLUMNS),
                                  ("step", 0, 2**63 - 1), ("saved_ns", 0, 2**63 - 1)):
            value = getattr(self, name)
            require(type(value) is int and least <= value <= most, name, value,
                    f"must be a whole number in {least}..{most}")
        for name in ("dtype", "site", "fingerprint", "run"):
            require(isinstance(getattr(self, name), str), name, getattr(self, name),
                    "must be a text")
        require(isinstance(self.hash, Mapping), "hash", self.hash, "must be fields with values")
        assert self.format  # which checks dtype

    @property
    def format(self) -> RowFormat:
        return RowFormat(self.dtype, self.dim)

    @property
    def block_rows(self) -> int:
        """Rows that share a checksum."""
        return max(1, BLOCK_BYTES // self.format.row_bytes)

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)


def table_info(addressing: Addressing, site_name: str, dtype: str, run: str = "",
               step: int = 0, saved_ns: int = 0) -> TableInfo:
    """Say what the table of a site is for this addressing, and what a file must be to serve it."""
    site, = (site for site in addressing.sites if site.name == site_name)
    return TableInfo(
        rows=site.rows, dim=site.dim, dtype=dtype, site=site_name,
        hash=addressing.hashes[site_name].constants(),
        fingerprint=addressing.fingerprints()[site_name], run=run, step=step, saved_ns=saved_ns)


def header_bytes(info: TableInfo) -> bytes:
    """Make the header, as long as it lies in the file."""
    fields = {"block_rows": info.block_rows, "row_bytes": info.format.row_bytes,
              **dataclasses.asdict(info)}
    text = json.dumps(fields).encode()
    whole = _START.pack(MAGIC, VERSION, len(text)) + text
    return whole.ljust(-(-len(whole) // _PAGE) * _PAGE, b"\0")


def trailer_bytes(header: bytes, checksums_K: np.ndarray) -> bytes:
    """Make the trailer for block checksums, uint32 [K]."""
    blocks = checksums_K.astype("<u4").tobytes()
    return blocks + struct.pack("<I", zlib.crc32(blocks, zlib.crc32(header)))


@dataclasses.dataclass(frozen=True)
class TableFile:
    """Says where things are in a file that has been opened.

    Attributes:
      info: what the table is.
      data_start: the offset of row 0.
      checksums_K: uint32 [K], of the blocks.
    """

    info: TableInfo
    data_start: int
    checksums_K: np.ndarray


def read_table_file(path: Path, file: BinaryIO) -> TableFile:
    """Read and check header and trailer.

    Raises:
      UserError: this is no table, or a field of its header is not what it must be.
      MachineError: it is cut short, altered, or cannot be read.
    """
    with refusals(path, "read"):
        header, fields = _header(path, file)
        info = _info(path, fields)
        size = os.fstat(file.fileno()).st_size
        data_stop = len(header) + info.rows * info.format.row_bytes
        expected = data_stop + 4 * info.blocks + 4
        if size != expected:
            cut = "cut short" if size < expected else "too long"
            raise MachineError(f"{path}: has {size} bytes, a table of {info.rows} rows of "
                               f"{info.format.row_bytes} has {expected}: it is {cut}")
        file.seek(data_stop)
        trailer = file.read(4 * info.blocks + 4)
    checksums_K = np.frombuffer(trailer, "<u4", info.blocks)
    if trailer_bytes(header, checksums_K) != trailer:
        raise MachineError(f"{path}: its header or its checksums are altered; {_AGAIN}")
    return TableFile(info, len(header), checksums_K)


def _header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    start = file.read(_START.size)
    magic, version, length = (_START.unpack(start) if len(start) == _START.size
                              else (start[:8], 0, 0))
    if magic != MAGIC:
        raise UserError(f"{path}: is not a table (it begins with {magic!r}, not {MAGIC!r})")
    if version != VERSION:
        raise UserError(f"{path}: has version {version} of the format; this reads {VERSION}")
    if length > _LARGEST_HEADER:
        raise MachineError(f"{path}: its header is altered; {_AGAIN}")
    padded = -(-(_START.size + length) // _PAGE) * _PAGE
    header = start + file.read(padded - _START.size)
    if len(header) != padded:
        raise MachineError(f"{path}: is cut short in its header")
    try:
        fields = json.loads(header[_START.size:_START.size + length])
    except (ValueError, RecursionError) as error:
        raise MachineError(f"{path}: its header is altered; {_AGAIN}") from error
    if not isinstance(fields, dict):
        raise MachineError(f"{path}: its header is altered; {_AGAIN}")
    return header, fields


def _info(path: Path, fields: dict[str, Any]) -> TableInfo:
    sizes = fields.pop("block_rows", None), fields.pop("row_bytes", None)
    try:
        info = TableInfo(**fields)
    except TypeError as error:  # a field too few, or too many
        raise MachineError(f"{path}: its header is altered; {_AGAIN}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}; {_AGAIN}") from error
    if sizes != (info.block_rows, info.format.row_bytes):
        raise MachineError(f"{path}: its header is altered; {_AGAIN}")
    return info


def check_serves(path: Path, info: TableInfo, expect: TableInfo) -> None:
    """Refuse a table whose rows mean something else to a model.

    What says where it comes from (`run`, `step`, `saved_ns`) and `dtype` may differ.

    Raises:
      UserError: the first field that differs, both values.
    """
    def refuse(field: str, value: object, right: object) -> None:
        raise UserError(f"{path}: {field} = {value}: this model needs {right}; export the table "
                        "of the run that is served, or write this model's")

    for name in expect.hash:  # what a person chose comes first, what follows from it last
        if info.hash.get(name) != expect.hash[name]:
            refuse(f"hash.{name}", info.hash.get(name), expect.hash[name])
    if info.fingerprint != expect.fingerprint:
        refuse("fingerprint", info.fingerprint, f"{expect.fingerprint} (another tokenizer)")
    for name in ("site", "rows", "dim"):
        if getattr(info, name) != getattr(expect, name):
            refuse(name, getattr(info, name), getattr(expect, name))


class TableWriter(WholeFile):
    """Writes a table from its first row to its last; the file appears whole or not at all.

    Use as a context manager; leaving it with an exception leaves no file.

    Args:
      path: on a disk.
      info: what the table is.

    Raises:
      UserError: a path in object storage.
      MachineError: the file cannot be written, for example because the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str], info: TableInfo):
        require_local(path)
        self.info = info
        self._checksums_K = np.zeros(info.blocks, np.uint32)
        self._header = header_bytes(info)
        self._written = 0
        path = Path(path)
        with refusals(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._require_space(path)
        super().__init__(path)
        try:
            self.put(self._header)
        except MachineError:
            self.discard()
            raise

    def write(self, packed_UB: np.ndarray) -> None:
        """Append packed rows, uint8 [U, B].

        Raises:
          UserError: another width, or more rows than the table has.
          MachineError: the disk refuses them.
        """
        packed_UB = np.ascontiguousarray(packed_UB)
        right = [self.info.rows - self._written, self.info.format.row_bytes]
        require(packed_UB.dtype == np.uint8 and packed_UB.ndim == 2
                and packed_UB.shape[1] == right[1] and len(packed_UB) <= right[0], "packed",
                f"{packed_UB.dtype} {packed_UB.shape}", f"must be uint8 [at most {right[0]}, "
                f"{right[1]}]")
        self.put(packed_UB.reshape(-1).data)
        start = 0
        while start < len(packed_UB):
            block, done = divmod(self._written, self.info.block_rows)
            stop = min(start + self.info.block_rows - done, len(packed_UB))
            self._checksums_K[block] = zlib.crc32(
                packed_UB[start:stop].data, int(self._checksums_K[block]))
            self._written += stop - start
            start = stop

    def finish(self) -> None:
        """Write the trailer, and put the file in its place.

        Raises:
          UserError: rows are missing.
          MachineError: the disk refuses it.
        """
        require(self._written == self.info.rows, "rows written", self._written,
                f"must be {self.info.rows}")
        self.put(trailer_bytes(self._header, self._checksums_K))
        super().finish()

    def _require_space(self, path: Path) -> None:
        needed = len(self._header) + self.info.rows * self.info.format.row_bytes
        if (free := shutil.disk_usage(path.parent).free) < needed:
            raise MachineError(f"{path}: needs {needed / 1e9:.1f} GB, the disk has "
                               f"{free / 1e9:.1f} GB free")


def require_local(path: str | os.PathLike[str]) -> None:
    """Refuse object storage.

    Raises:
      UserError: `path` is not on a disk.
    """
    require(is_local(path), "table file", os.fspath(path),
            "rows are read from a local disk only; choose a path on one")


def verify(path: str | os.PathLike[str]) -> TableInfo:
    """Read a whole table, check every block, and say what it is.

    Raises:
      UserError: this is no table.
      MachineError: the first block that fails, or what `read_table_file` raises.
    """
    require_local(path)
    path = Path(path)
    with refusals(path, "read"), path.open("rb", buffering=0) as file:
        table = read_table_file(path, file)
        for _ in checked_rows(path, file, table):
            pass
    return table.info


def checked_rows(path: Path, file: Any, table: TableFile) -> Iterator[tuple[int, np.ndarray]]:
    """Read and check a whole table in pieces: first id and uint8 [U, B], valid until the next.

    Raises:
      MachineError: a block fails its check, or cannot be read.
    """
    info = table.info
    width, at_once = info.format.row_bytes, max(1, _READ_AT_ONCE // BLOCK_BYTES) * info.block_rows
    buffer_UB = np.empty((min(at_once, info.rows), width), np.uint8)
    file.seek(table.data_start)
    for first in range(0, info.rows, at_once):
        packed_UB = buffer_UB[:info.rows - first]
        with refusals(path, "read"):
            _fill(file, packed_UB.reshape(-1).data)
        check_blocks(path, table, first // info.block_rows, packed_UB)
        yield first, packed_UB


def check_blocks(path: Path, table: TableFile, block: int, packed_UB: np.ndarray) -> None:
    """Refuse whole blocks of packed rows, from `block` on, that are not as they were written.

    Raises:
      MachineError: the first that is not.
    """
    for start in range(0, len(packed_UB), table.info.block_rows):
        rows_UB = packed_UB[start:start + table.info.block_rows]
        if zlib.crc32(rows_UB.data) != table.checksums_K[block]:
            first = block * table.info.block_rows
            raise MachineError(f"{path}: rows {first}..{first + len(rows_UB) - 1} are altered "
                               f"(block {block} fails its checksum); {_AGAIN}")
        block += 1


def _fill(file: Any, data: memoryview) -> None:
    while data:
        count = file.readinto(data)
        if not count:
            raise OSError("the file ended while it was read")
        data = data[count:]
