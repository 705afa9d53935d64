"""Table files: the rows of the host's table bit for bit; nothing from one that is not whole."""

import contextlib
import errno
import json
import os
import resource
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.config import ROW_DTYPES
from engram_jax.errors import MachineError, UserError
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.offload import disk, file
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableInfo, TableWriter, verify
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable

ROWS, DIM = 1000, 40
HASH = NgramHash(rows_per_head=(50, 70), heads=2, layers=(1, 4), vocab_size=300, pad_id=7)


def table_info(dtype="fp8", rows=ROWS, dim=DIM, **fields):
    return TableInfo(rows=rows, dim=dim, dtype=dtype, **{
        "site": "layer_1", "hash": HASH.constants(), "fingerprint": "ab:cd", **fields})


def packed(info, seed=0):
    values = np.random.default_rng(seed).standard_normal((info.rows, info.dim))
    return info.format.pack(values.astype(np.float32))


def write(path, info, pieces=3):
    rows = packed(info)
    with TableWriter(path, info) as writer:
        for piece in np.array_split(rows, pieces):
            writer.write(piece)
    return rows


@pytest.fixture(name="path")
def a_table(tmp_path):
    write(tmp_path / "a.table", table_info())
    return tmp_path / "a.table"


@pytest.fixture(name="opened")
def opens_and_closes():
    """Opens homes, and closes them after the test."""
    with contextlib.ExitStack() as stack:
        def opened(open_home, *arguments, **options):
            return stack.enter_context(contextlib.closing(open_home(*arguments, **options)))

        yield opened


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("check", disk.CHECKS)
def test_disk_and_host_give_the_same_bytes(tmp_path, dtype, check):
    info = table_info(dtype)
    rows = write(tmp_path / "t", info)
    homes = [DiskTable.open(tmp_path / "t", check=check), HostTable(info.format, rows),
             HostTable.from_file(tmp_path / "t")]
    ids = np.random.default_rng(1).integers(0, ROWS, 300)
    ids[:3] = 0, ROWS - 1, ROWS - 1
    for home in homes:
        assert (home.format, home.rows) == (info.format, ROWS)
        for asked in (ids, ids[:1], ids[:0], np.arange(ROWS), ids.astype(np.int32)):
            np.testing.assert_array_equal(home.lookup(asked), rows[asked])
        out = np.full((400, info.format.row_bytes), 77, np.uint8)
        found = home.lookup(ids, out)
        assert found.base is out
        np.testing.assert_array_equal(out[:300], rows[ids])
        assert (out[300:] == 77).all()
        home.close()
        with pytest.raises(UserError, match="row id = 3: must be in"):
            home.lookup(np.array([3]))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 700), dim=st.sampled_from([1, 8, 33, 2000]),
       at_once=st.sampled_from([1, 7, 4096]), seed=st.integers(0, 99))
def test_any_size_and_any_ids(tmp_path_factory, rows, dim, at_once, seed):
    """Rows beside each other, within a page, of several pages; more than are read at once."""
    path = tmp_path_factory.mktemp("sizes") / "t"
    expected = write(path, table_info("int8", rows, dim), pieces=1 + seed % 5)
    assert verify(path).rows == rows
    random = np.random.default_rng(seed)
    ids = random.integers(0, rows, random.integers(0, 200)) // random.integers(1, 20)
    for check in disk.CHECKS:
        home = DiskTable.open(path, check=check)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "_ROWS_AT_ONCE", at_once)
            np.testing.assert_array_equal(home.lookup(ids), expected[ids])
        home.close()


def test_a_file_knows_what_it_is(path, opened):
    home = opened(DiskTable.open, path, expect=table_info())
    assert home.info == table_info() == verify(path)


@pytest.mark.parametrize("bad", [-1, ROWS, -(2**40)])
@pytest.mark.parametrize("open_home", [DiskTable.open, HostTable.from_file])
def test_ids_out_of_range(path, opened, open_home, bad):
    table = opened(open_home, path)
    with pytest.raises(UserError, match=rf"row id = {bad}: must be in 0..{ROWS - 1}"):
        table.lookup(np.array([3, bad, 4]))
    with pytest.raises(UserError, match=r"row ids = 'float64 \(1,\)': must be whole numbers"):
        table.lookup(np.array([1.0]))


@pytest.mark.parametrize("open_home", [DiskTable.open, HostTable.from_file])
def test_an_out_that_does_not_fit(path, opened, open_home):
    table = opened(open_home, path)
    for out in (np.empty((1, 42), np.uint8), np.empty((9, 41), np.uint8), np.empty((9, 42), "i1"),
                np.empty((18, 42), np.uint8)[::2]):
        with pytest.raises(UserError, match=r"out = .*: must be contiguous uint8 \[at least 2, 42"):
            table.lookup(np.array([1, 2]), out)


@pytest.mark.parametrize(("cut", "why"), [
    (slice(0, -1), "cut short"), (slice(0, 9000), "cut short"), (slice(0, 100), "cut short"),
    (slice(0, 4096), "cut short")])
def test_a_file_cut_short_does_not_open(path, cut, why):
    path.write_bytes(path.read_bytes()[cut])
    for use in (DiskTable.open, HostTable.from_file, verify):
        with pytest.raises(MachineError, match=f"a.table: .*{why}"):
            use(path)


def test_a_file_with_more_in_it_does_not_open(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(MachineError, match=r"a.table: .*too long"):
        DiskTable.open(path)


def test_altered_rows_are_not_served(path, opened):
    """What is near them is; the first that is altered is named."""
    info, rows = table_info(), packed(table_info())
    assert info.block_rows == 390
    flip(path, 4096 + 500 * info.format.row_bytes + 13)
    why = (r"a.table: rows 390..779 are altered \(block 1 fails its checksum\); export it again, "
           "or write it again")
    for use in (verify, HostTable.from_file):
        with pytest.raises(MachineError, match=why):
            use(path)
    home = opened(DiskTable.open, path, check="read")
    ids = np.array([5, 389, 999])
    np.testing.assert_array_equal(home.lookup(ids), rows[ids])
    for _ in range(2):
        with pytest.raises(MachineError, match=why):
            home.lookup(np.array([5, 390]))
    unchecked = opened(DiskTable.open, path)
    assert (unchecked.lookup(np.array([500])) != rows[500]).any()


def test_the_last_rows_are_checked_though_they_fill_no_block(path, opened):
    info = table_info()
    assert ROWS % info.block_rows
    flip(path, 4096 + ROWS * info.format.row_bytes - 1)
    why = r"rows 780..999 are altered \(block 2 fails its checksum\)"
    for use in (verify, HostTable.from_file):
        with pytest.raises(MachineError, match=why):
            use(path)
    with pytest.raises(MachineError, match=why):
        opened(DiskTable.open, path, check="read").lookup(np.array([ROWS - 1]))


def test_a_block_is_checked_once(path, opened, monkeypatch):
    home = opened(DiskTable.open, path, check="read")
    sizes, real = [], os.preadv

    def counted(file, buffers, offset):
        sizes.append(len(buffers[0]))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    for ids in ([5], [6, 200], [900]):
        home.lookup(np.array(ids))
    assert sizes == [390 * 42, 42, 42, 42, 220 * 42, 42]


@pytest.mark.parametrize("at", [0, 20, 200, -2, -9])
def test_an_altered_header_or_trailer_does_not_open(path, at):
    flip(path, at)
    for use in (DiskTable.open, verify):
        with pytest.raises((MachineError, UserError), match=r"a.table: .*(altered|not a table)"):
            use(path)


def with_header(path, change):
    """The file with another text in its header, for which the trailer vouches."""
    data = path.read_bytes()
    _, _, length = struct.unpack_from("<8sII", data)
    text = change(data[16:16 + length])
    header = (struct.pack("<8sII", data[:8], 1, len(text)) + text).ljust(4096, b"\0")
    blocks = data[-16:-4]
    path.write_bytes(header + data[4096:-4]
                     + struct.pack("<I", zlib.crc32(blocks, zlib.crc32(header))))


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b'"dim": 40', b'"dim": 41'),
    lambda text: text.replace(b'"row_bytes": 42', b'"row_bytes": 42.5'),
    lambda text: text.replace(b'"block_rows": 390, ', b""),
    lambda text: text.replace(b'"dim": 40, ', b""),
    lambda text: text.replace(b'"dim": 40', b'"dim": 40, "width": 3'),
    lambda text: b"[" * 3000, lambda text: b"[1, 2]", lambda text: b"7", lambda text: b"\xff"])
def test_a_header_that_contradicts_itself_is_refused(path, change):
    """The trailer alone vouches for the fields."""
    with_header(path, change)
    line = "a.table: its header is altered; export it again, or write it again"
    for use in (DiskTable.open, HostTable.from_file, verify):
        with pytest.raises(MachineError, match=line):
            use(path)


@pytest.mark.parametrize(("field", "value", "line"), [
    ("dim", "8.0", "dim = 8.0: must be a whole number in 1..16777216"),
    ("dim", "true", "dim = True: must be a whole number"),
    ("dim", "-40", "dim = -40: must be a whole number"),
    ("rows", "1e3", "rows = 1000.0: must be a whole number in 1.."),
    ("rows", "1" + 30 * "0", "rows = 1000000000000000000000000000000: must be a whole number in "),
    ("rows", "NaN", "rows = nan: must be a whole number"),
    ("rows", '"1000"', "rows = '1000': must be a whole number"),
    ("step", "null", "step = None: must be a whole number in 0.."),
    ("saved_ns", "-1", "saved_ns = -1: must be a whole number in 0.."),
    ("dtype", "[1]", r"dtype = \[1\]: must be a text"),
    ("dtype", '"int4"', "dtype = 'int4': must be one of float32, bfloat16, int8, fp8"),
    ("site", "{}", "site = {}: must be a text"),
    ("hash", "3", "hash = 3: must be fields with values")])
def test_a_field_that_is_not_what_it_must_be_is_one_line(path, field, value, line):
    def change(text):
        fields = json.loads(text)
        fields[field] = "HERE"
        return json.dumps(fields).replace('"HERE"', value).encode()

    with_header(path, change)
    for use in (DiskTable.open, HostTable.from_file, verify):
        with pytest.raises(UserError, match=f"a.table: {line}") as raised:
            use(path)
        assert len(str(raised.value).splitlines()) == 1


def test_a_header_that_promises_more_than_the_file_has_takes_no_memory(path):
    def change(text):
        return text.replace(b'"rows": 1000', b'"rows": 2000000000')

    with_header(path, change)
    for use in (DiskTable.open, HostTable.from_file, verify):
        with pytest.raises(MachineError, match=r"a.table: has .* it is cut short"):
            use(path)


def test_what_is_no_table(tmp_path):
    (tmp_path / "text").write_text("hello there, this is no table")
    (tmp_path / "empty").write_text("")
    for name in ("text", "empty"):
        with pytest.raises(UserError, match=f"{name}: is not a table"):
            DiskTable.open(tmp_path / name)
    with pytest.raises(MachineError, match=r"none: could not be read \(No such file"):
        DiskTable.open(tmp_path / "none")
    with pytest.raises(UserError, match="table file = 'gs://b/t': rows are read from a local disk"):
        DiskTable.open("gs://b/t")
    with pytest.raises(UserError, match="check = 'often': must be one of none, read"):
        DiskTable.open(tmp_path / "text", check="often")


def test_another_version(path):
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    with pytest.raises(UserError, match="has version 9 of the format; this reads 1"):
        verify(path)


@pytest.mark.parametrize(("field", "value", "line"), [
    ("hash", NgramHash(rows_per_head=(50, 70), heads=2, layers=(1, 4), vocab_size=300, pad_id=7,
                       seed=1).constants(), r"hash.seed = 0: this model needs 1"),
    ("hash", NgramHash(rows_per_head=(50, 71), heads=2, layers=(1, 4), vocab_size=300,
                       pad_id=7).constants(),
     r"hash.rows_per_head = \[50, 70\]: this model needs \[50, 71\]"),
    ("fingerprint", "ab:ce", "fingerprint = ab:cd: this model needs ab:ce"),
    ("site", "layer_4", "site = layer_1: this model needs layer_4"),
    ("dim", 80, "dim = 40: this model needs 80"),
    ("rows", 1001, "rows = 1000: this model needs 1001")])
def test_a_table_of_another_model_is_refused(path, field, value, line):
    for use in (DiskTable.open, HostTable.from_file):
        with pytest.raises(UserError, match=f"a.table: {line}"):
            use(path, expect=table_info(**{field: value}))


def test_expectation_lets_the_dtype_and_the_run_differ(path, opened):
    other = table_info("float32", run="other", step=9)
    assert opened(DiskTable.open, path, expect=other).rows == ROWS


def test_reads_that_the_disk_refuses_are_raised(path, opened, monkeypatch):
    home = opened(DiskTable.open, path)

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(MachineError, match=r"a.table: could not be read \(Input/output error\)"):
        home.lookup(np.array([1]))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(MachineError, match=r"a.table: ended while it was read"):
        home.lookup(np.array([1]))


@pytest.mark.parametrize("room", [100, 20_000, 4096 + ROWS * 42 + 5])
def test_a_disk_that_refuses_more_leaves_nothing(tmp_path, room):
    """In the header, in the rows, in the checksums; a limit on files stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(MachineError, match=r"t: could not be written \(File too large\)"):
            write(tmp_path / "t", table_info())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9**9, 9**9, 999))
    info = table_info(rows=10**8, dim=256)
    with pytest.raises(MachineError, match=r"t: needs 26\.4 GB, the disk has 0\.0 GB free"):
        TableWriter(tmp_path / "t", info)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_what_was_there(path):
    before = path.read_bytes()

    def interrupted():
        with TableWriter(path, table_info()) as writer:
            writer.write(packed(table_info())[:10])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["a.table"]


def test_a_table_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened, flushed, moved = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append("disk") or flushed(handle))
    monkeypatch.setattr(os, "replace", lambda source, target: happened.append(
        os.path.basename(target)) or moved(source, target))
    write(tmp_path / "a.table", table_info())
    assert happened == ["disk", "a.table", "disk"]


def test_a_writer_wants_every_row_once(tmp_path):
    info, rows = table_info(), packed(table_info())

    def writing(*pieces):
        with TableWriter(tmp_path / "t", info) as writer:
            for piece in pieces:
                writer.write(piece)

    with pytest.raises(UserError, match="rows written = 999: must be 1000"):
        writing(rows[:999])
    with pytest.raises(UserError, match=r"must be uint8 \[at most 1, 42\]"):
        writing(rows[:999], rows[:2])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="table file = 'gs://b/t'"):
        TableWriter("gs://b/t", info)


def write_sparse(path, info):
    """A table of zeros that takes no room on the disk but for its checksums."""
    zeros = bytes(info.block_rows * info.format.row_bytes)
    checksums_K = np.full(info.blocks, zlib.crc32(zeros), np.uint32)
    last = info.rows - (info.blocks - 1) * info.block_rows
    checksums_K[-1] = zlib.crc32(zeros[:last * info.format.row_bytes])
    header = file.header_bytes(info)
    with path.open("wb") as sink:
        sink.write(header)
        sink.seek(len(header) + info.rows * info.format.row_bytes)
        sink.write(file.trailer_bytes(header, checksums_K))


def test_a_table_of_a_hundred_billion_parameters_opens_in_a_second(tmp_path):
    info = table_info(rows=390_625_000, dim=256)
    write_sparse(tmp_path / "huge", info)
    assert (tmp_path / "huge").stat().st_size > 103e9
    start = time.perf_counter()
    home = DiskTable.open(tmp_path / "huge", expect=info, check="read")
    assert time.perf_counter() - start < 1
    ids = np.random.default_rng(0).integers(0, info.rows, 50)
    assert not RowFormat("fp8", 256).unpack_numpy(home.lookup(ids)).any()
    home.close()
