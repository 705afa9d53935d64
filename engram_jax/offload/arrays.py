"""A table that somebody holds as an array is put into host memory or into a file, and opened there.

An array is [rows, dim], in the order of the row ids, or [S, R, dim] as tables on a mesh are stored:
row id r at (r mod S, r div S), and padding behind the last row.

Shapes: S shards, R rows of a shard, U rows, D columns, B bytes of a packed row.
"""

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from engram_jax.config import require
from engram_jax.hashing.addressing import Addressing, Site
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableInfo, TableWriter, table_info
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.home import Home
from engram_jax.offload.host import HostTable
from engram_jax.offload.host_cache import CachedTable

_PACKED_AT_ONCE = 16 * 1024  # rows
MEMORIES = ("disk", "host")


def write_table(
    path: str | os.PathLike[str], table: jax.Array | np.ndarray, dtype: str = "float32", *,
    addressing: Addressing | None = None, site: str = "", rows: int = 0,
) -> TableInfo:
    """Write an array to a table file, which appears whole or not at all, and say what it is.

    Args:
      path: on a disk; folders that are not there are made.
      table: [rows, dim] or [S, R, dim], of floats; uint16 are the bits of bfloat16.
      dtype: of the rows in the file, one of `config.ROW_DTYPES`; rounded to nearest.
      addressing: what asks for the rows; the file is then refused for another one. None takes any.
      site: whose table it is; "" is the only one of the addressing.
      rows: how many rows [S, R, dim] has before its padding; 0 is as many as the site has.

    Raises:
      UserError: another shape or dtype than the site's, an entry that is not finite, or `path` is
        not on a disk.
      MachineError: the file cannot be written.
    """
    here = None if addressing is None else _site(addressing, site)
    rows, dim = _size(table, rows, here)
    if addressing is None or here is None:
        info = TableInfo(rows=rows, dim=dim, dtype=dtype, site=site, hash={}, fingerprint="")
    else:
        info = table_info(addressing, here.name, dtype)
    with TableWriter(path, info) as writer:
        for packed_UB in _packed(table, rows, info.format):
            writer.write(packed_UB)
    return info


def host_table(
    table: jax.Array | np.ndarray, dtype: str = "float32", *, rows: int = 0
) -> HostTable:
    """Copy an array into host memory, to serve rows from there.

    Args:
      table, dtype, rows: as for `write_table`.

    Raises:
      UserError: as `write_table`.
      MachineError: there is not enough free memory.
    """
    rows, dim = _size(table, rows, None)
    home, start = HostTable.allocate(RowFormat(dtype, dim), rows), 0
    for packed_UB in _packed(table, rows, home.format):
        home.write(start, packed_UB)
        start += len(packed_UB)
    return home


def open_table(
    path: str | os.PathLike[str], addressing: Addressing | None = None, site: str = "", *,
    memory: str = "disk", cache_bytes: int = 0,
) -> Home:
    """Open a table file; what is read of it is checked against its checksums.

    Args:
      path: on a disk.
      addressing, site: as for `write_table`; a table of another hash is then refused.
      memory: "disk" leaves it there, "host" reads it whole into host memory.
      cache_bytes: of host memory, for the rows on disk that were used last; 0 keeps none.

    Raises:
      UserError: no table, or one of another hash; a setting out of range.
      MachineError: it is not whole, cannot be read, or there is not enough memory.
    """
    require(memory in MEMORIES, "memory", memory, f"must be one of {', '.join(MEMORIES)}")
    require(not cache_bytes or (memory == "disk" and addressing is not None), "cache_bytes",
            cache_bytes, "is of a table on disk, and needs the addressing, by whose n-grams it "
            "keeps rows")
    here = None if addressing is None else _site(addressing, site)
    expect = None if addressing is None or here is None else table_info(
        addressing, here.name, "float32")  # of any dtype
    if memory == "host":
        return HostTable.from_file(path, expect)
    home = DiskTable.open(path, expect, check="read")
    if here is None or not cache_bytes:
        return home
    try:
        return CachedTable(home, here.hash_config.heads, cache_bytes)
    except BaseException:
        home.close()
        raise


def _site(addressing: Addressing, name: str) -> Site:
    sites = {site.name: site for site in addressing.sites}
    if not name and len(sites) == 1:
        return addressing.sites[0]
    require(name in sites, "site", name, f"must be one of {', '.join(sites)}")
    return sites[name]


def _size(table: Any, rows: int, site: Site | None) -> tuple[int, int]:
    """Rows and columns of an array that is a table; those of the site, if one is given."""
    kinds = "must be [rows, dim] or [shards, rows of a shard, dim] of floats"
    require(hasattr(table, "shape") and hasattr(table, "dtype"), "table", type(table).__name__,
            f"{kinds}, a NumPy or jax array")
    given, shape = f"{table.dtype} {tuple(table.shape)}", table.shape
    require(len(shape) in (2, 3) and (table.dtype == np.uint16
                                      or jax.dtypes.issubdtype(table.dtype, np.floating)),
            "table", given, kinds)
    if len(shape) == 2:
        rows = rows or shape[0]
        require(rows == shape[0], "rows", rows, f"must be {shape[0]}, as the table has")
    else:
        rows = rows or (0 if site is None else site.rows)
        require(0 < rows <= shape[0] * shape[1], "rows", rows,
                f"must be in 1..{shape[0] * shape[1]}: how many of the rows are not padding")
    if site is not None:
        require((rows, shape[-1]) == (site.rows, site.dim), "table", given,
                f"must have the {site.rows} rows and {site.dim} columns of {site.name}")
    return rows, shape[-1]


def _packed(table: jax.Array | np.ndarray, rows: int, format: RowFormat) -> Iterator[np.ndarray]:
    """The packed rows of a table in the order of their ids, uint8 [U, B] at a time."""
    sharded = table.ndim == 3
    of_id = table.shape[0] if sharded else 1  # so many ids at each index of the axis of rows
    at_once = max(1, _PACKED_AT_ONCE // of_id)
    for start in range(0, -(-rows // of_id), at_once):
        part = slice(start, start + at_once)
        rows_UD = (np.asarray(table[:, part]).swapaxes(0, 1).reshape(-1, table.shape[-1])
                   if sharded else np.asarray(table[part]))
        yield format.pack_stored(rows_UD[:rows - start * of_id])
