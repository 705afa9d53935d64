"""Tables off the device: in host memory, on a disk, behind caches; rows are sent ahead of need.

What is named here is for other people's networks, has its section in docs/parts.md, and stays.
"""

from typing import TYPE_CHECKING

from engram_jax.faces import face

if TYPE_CHECKING:
    from engram_jax.offload.arrays import host_table, open_table, write_table
    from engram_jax.offload.counters import TierCounts
    from engram_jax.offload.disk import DiskTable
    from engram_jax.offload.file import TableInfo, verify
    from engram_jax.offload.formats import RowFormat
    from engram_jax.offload.home import Home
    from engram_jax.offload.host import HostTable
    from engram_jax.offload.host_cache import CachedTable
    from engram_jax.offload.prefetch import HostRows
    from engram_jax.offload.source import Counters, RowSource

_MODULES = {
    "CachedTable": "host_cache",
    "Counters": "source",
    "DiskTable": "disk",
    "Home": "home",
    "HostRows": "prefetch",
    "HostTable": "host",
    "RowFormat": "formats",
    "RowSource": "source",
    "TableInfo": "file",
    "TierCounts": "counters",
    "host_table": "arrays",
    "open_table": "arrays",
    "verify": "file",
    "write_table": "arrays",
}

__all__ = [
    "CachedTable",
    "Counters",
    "DiskTable",
    "Home",
    "HostRows",
    "HostTable",
    "RowFormat",
    "RowSource",
    "TableInfo",
    "TierCounts",
    "host_table",
    "open_table",
    "verify",
    "write_table",
]

__getattr__, __dir__ = face(__name__, _MODULES)
