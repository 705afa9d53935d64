"""How much of this host's memory the process may use: the machine's, or its container's if smaller.

A container's limit is a control group's, of Linux's version 1 or 2; every group above the process's
own may set one. Where the system does not tell, as on other systems than Linux, nothing is known.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")  # of the system's files; tests have their own
# Of each version: below /sys/fs/cgroup, its files for limit and use, and in memory.stat what of the
# use is files that the system lets go when memory is wanted.
_VERSIONS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def total_bytes() -> int:
    """All memory that processes like this one may ever have."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _limits())])


def available_bytes() -> int | None:
    """Memory that can be had now without swapping; None where the system does not tell."""
    free = _numbers(_ROOT / "proc/meminfo").get("MemAvailable")
    known = [] if free is None else [free * 1024]
    known += [max(0, limit - used) for limit, used in _limits()]
    return min(known, default=None)


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and present use of each control group that limits this process, in bytes."""
    for line in _text(_ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version in _VERSIONS:
            folder, limit_name, used_name, files_name = _VERSIONS[version]
            top = _ROOT / "sys/fs/cgroup" / folder
            for group in _upwards(top, path):
                limit, used = _text(group / limit_name), _text(group / used_name)
                if limit.strip().isdigit() and used.strip().isdigit():  # else "max", or not there
                    files = _numbers(group / "memory.stat").get(files_name, 0)
                    yield int(limit), int(used) - files


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The folders of a group and of those above it; a container may see its own as the top."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:length])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number" or "name: number unit" of a file."""
    return {name: int(number) for name, number in
            re.findall(r"^(\w+):?\s+(\d+)", _text(path), flags=re.MULTILINE)}
