"""Tables in host memory: the rows that were put there, and one line where there is no room."""

from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.config import ROW_DTYPES
from engram_jax.errors import MachineError, UserError
from engram_jax.offload import host
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable


def test_a_table_that_is_allocated_holds_zeros_until_it_is_written():
    table = HostTable.allocate(RowFormat("fp8", 40), 100)
    assert (table.rows, table.nbytes) == (100, 4200)
    assert not table.lookup(np.arange(100)).any()
    packed = np.random.default_rng(0).integers(0, 256, (30, 42)).astype(np.uint8)
    table.write(70, packed)
    np.testing.assert_array_equal(table.lookup(np.array([99, 70, 69, 99])),
                                  [packed[29], packed[0], np.zeros(42), packed[29]])
    for start, count in ((71, 30), (-1, 1)):
        with pytest.raises(UserError, match=rf"rows = \({start}, {start + count}\): must be in 0"):
            table.write(start, packed[:count])


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_decoded_values_on_the_device_are_those_of_the_rows(dtype):
    rows = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    form = RowFormat(dtype, 40)
    table = HostTable(form, form.pack(rows))
    ids = np.random.default_rng(1).integers(0, 50, 20)
    on_device = jax.jit(form.unpack)(jax.device_put(table.lookup(ids)))
    np.testing.assert_array_equal(on_device, form.unpack_numpy(form.pack(rows))[ids])


def test_an_array_of_another_format_is_refused():
    with pytest.raises(UserError, match=r"packed = .*: must be contiguous uint8 \[R, 42\]"):
        HostTable(RowFormat("fp8", 40), np.zeros((3, 40), np.uint8))
    with pytest.raises(UserError, match="rows = 0: must be at least 1"):
        HostTable.allocate(RowFormat("fp8", 40), 0)


def test_memory_that_is_not_there_is_one_line():
    with pytest.raises(MachineError, match=r"38[0-9]{3}\.\d GiB of host memory are needed, "):
        HostTable.allocate(RowFormat("float32", 1024), 10**10)


def test_huge_pages_are_counted(monkeypatch):
    """Linux gives them or not; without /proc the answer is none."""
    table = HostTable.allocate(RowFormat("fp8", 256), 100_000)
    assert 0 <= table.huge_bytes <= table.nbytes + 2**21
    monkeypatch.setattr(host, "Path", lambda _: Path("/nonexistent"))
    assert table.huge_bytes == 0


def test_memory_is_touched_where_the_system_cannot_do_it(monkeypatch):
    monkeypatch.setattr(host, "_POPULATE_WRITE", 12345)
    table = HostTable.allocate(RowFormat("fp8", 40), 1000)
    assert not table.lookup(np.arange(1000)).any()


def test_a_closed_table_serves_nothing():
    table = HostTable.allocate(RowFormat("fp8", 40), 10)
    table.close()
    with pytest.raises(UserError, match="row id = 3: must be in"):
        table.lookup(np.array([3]))
