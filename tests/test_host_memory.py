"""Memory that may be used is the container's where that is smaller than the machine's."""

import os

import pytest

from engram_jax import host_memory
from engram_jax.errors import MachineError
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 2**20


@pytest.fixture(name="system")
def a_system_of_files(tmp_path, monkeypatch):
    """Writes the files that Linux would have; MemAvailable is 8 GiB."""
    def system(files):
        for name, text in {"proc/meminfo": "MemTotal: 1 kB\nMemAvailable:  8388608 kB\n",
                           **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(host_memory, "_ROOT", tmp_path)

    return system


def group(folder, limit, used, files=0, version=2):
    names = (("memory.max", "memory.current", "inactive_file") if version == 2 else
             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return {f"sys/fs/cgroup/{folder}{names[0]}": f"{limit}\n",
            f"sys/fs/cgroup/{folder}{names[1]}": f"{used}\n",
            f"sys/fs/cgroup/{folder}memory.stat": f"anon 1\n{names[2]} {files}\n"}


V1 = "5:cpu,cpuacct:/\n4:memory:/pods/one\n0::/\n"


@pytest.mark.parametrize(("files", "total", "available"), [
    ({"proc/self/cgroup": "0::/\n"}, MACHINE, 8 * 2**30),
    ({"proc/self/cgroup": "0::/\n", **group("", "max", 5)}, MACHINE, 8 * 2**30),
    ({"proc/self/cgroup": "0::/\n", **group("", 64 * MIB, 40 * MIB, 10 * MIB)},
     64 * MIB, 34 * MIB),
    # The group above has less left, though its limit is larger.
    ({"proc/self/cgroup": "0::/a/b\n", **group("a/b/", 64 * MIB, MIB),
      **group("a/", 99 * MIB, 90 * MIB)}, 64 * MIB, 9 * MIB),
    ({"proc/self/cgroup": V1, **group("memory/pods/one/", 64 * MIB, MIB, 0, 1)},
     64 * MIB, 63 * MIB),
    # A container that sees its own group as the top, under the name that the machine gave it.
    ({"proc/self/cgroup": V1, **group("memory/", 32 * MIB, 33 * MIB, 0, 1)}, 32 * MIB, 0),
    ({"proc/self/cgroup": V1, **group("memory/pods/one/", 2**63 - 4096, MIB, 0, 1)},
     MACHINE, 8 * 2**30),
], ids=["none", "no limit", "version 2", "group above", "version 1", "own top", "boundless"])
def test_the_smallest_limit_counts(files, total, available, system):
    system(files)
    assert host_memory.total_bytes() == total
    assert host_memory.available_bytes() == available


def test_a_system_that_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_ROOT", tmp_path)
    assert host_memory.total_bytes() == MACHINE
    assert host_memory.available_bytes() is None


def test_a_table_larger_than_the_container_is_refused(system):
    system({"proc/self/cgroup": "0::/\n", **group("", 2**30, 2**29)})
    with pytest.raises(MachineError, match=r"1\.0 GiB of host memory are needed, 0\.5 GiB"):
        HostTable.allocate(RowFormat("float32", 256), 2**20)
