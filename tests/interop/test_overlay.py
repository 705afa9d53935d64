"""Changed rows over a table: exactly these, in every home, and off again bit for bit."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tables
import v41

from engram_jax.errors import UserError
from engram_jax.interop import safetensors
from engram_jax.interop.deepseek import open_deepseek
from engram_jax.interop.overlay import (
    OverlaidTable,
    Overlay,
    difference,
    lay_on_device,
    read_overlay,
    table_digest,
    write_difference,
)
from engram_jax.interop.released import open_released, stretches, write_released
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.offload.host_cache import CachedTable
from engram_jax.tables.layout import TableLayout

CHANGED = (0, 5, 17, 300)


@pytest.fixture(scope="module", name="folder")
def a_released_table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlay")
    OPENED.append(open_deepseek(v41.write(folder / "theirs")))
    write_released(OPENED[-1], folder / "ours")
    return folder


OPENED = []


@pytest.fixture(scope="module", autouse=True)
def closed_at_the_end():
    yield
    for released in OPENED:
        released.close()


def opened(folder, home, layer=1):
    OPENED.append(open_deepseek(folder / "theirs") if home == "shards"
                  else open_released(folder / "ours", home))
    return OPENED[-1].tables[layer]


def rows_of(home):
    return np.concatenate(list(stretches(home)))


def changed_rows(folder):
    rows_RB = rows_of(opened(folder, "host"))
    for row in (*CHANGED, len(rows_RB) - 1):
        rows_RB[row, row % 7] ^= 1
    return rows_RB


@pytest.fixture(scope="module", name="overlay")
def an_overlay(folder):
    """Made from a table and what became of it, and read back from its file."""
    made = difference(opened(folder, "disk"), np.array_split(changed_rows(folder), 9))
    made.write(folder / "changed.safetensors")
    assert (folder / "changed.safetensors").stat().st_size < 2000
    return read_overlay(folder / "changed.safetensors")


@pytest.mark.parametrize("home", ["shards", "disk", "host", "cached"])
def test_an_overlay_changes_exactly_its_rows_and_comes_off_bit_for_bit(folder, overlay, home):
    below = opened(folder, "disk" if home == "cached" else home)
    before, expected = rows_of(below), changed_rows(folder)
    assert overlay.ids_U.tolist() == [*CHANGED, len(before) - 1]
    table = over = OverlaidTable(below, overlay)
    if home == "cached":
        table = CachedTable(over, 2, 4096)
    ids = np.random.default_rng(0).integers(0, len(before) // 2, 600)
    pairs = np.stack([2 * ids, 2 * ids + 1], axis=1).reshape(-1)  # of one n-gram each
    for _ in range(2):  # the second time out of the cache
        np.testing.assert_array_equal(table.lookup(pairs), expected[pairs])
    np.testing.assert_array_equal(rows_of(over), expected)
    np.testing.assert_array_equal(rows_of(over.below), before)
    table.close()


def test_the_digest_of_a_table_is_the_same_in_every_home_and_of_every_bit(folder):
    digests = {table_digest(opened(folder, home)) for home in ("shards", "disk", "host")}
    assert len(digests) == 1
    table = opened(folder, "host")
    table.packed_RB[77, 3] ^= 128
    assert table_digest(table) not in digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_overlay_on_the_device_changes_its_rows_and_comes_off(dtype):
    layout, form = TableLayout(rows=101, dim=4, shards=8), RowFormat(dtype, 4)
    host = HostTable(form, form.pack(tables.random(101, 4)))
    stored = np.uint16 if dtype == "bfloat16" else np.float32
    table_SRD = jnp.asarray(tables.filled(layout, host.packed_RB.view(stored)))
    changed = host.packed_RB.copy()
    changed[[3, 50, 100]] ^= 1
    overlay = difference(host, [changed])
    laid, off = lay_on_device(layout, table_SRD, overlay)
    rows, padding = tables.flat(layout, laid)
    np.testing.assert_array_equal(rows.view(np.uint8), changed)
    np.testing.assert_array_equal(padding, tables.flat(layout, table_SRD)[1])
    again, on = lay_on_device(layout, laid, off)
    assert np.asarray(again).tobytes() == np.asarray(table_SRD).tobytes()
    assert (on.base, on.rows_UB.tobytes()) == (overlay.base, overlay.rows_UB.tobytes())
    with pytest.raises(UserError, match=r"overlay of the table = .*: this table is "):
        lay_on_device(layout, laid, overlay)


def test_an_overlay_of_another_table_is_refused(folder, overlay):
    other = opened(folder, "disk", layer=3)
    with pytest.raises(UserError, match=r"overlay of the table = .*: it is another, or has been"):
        OverlaidTable(other, overlay)
    with pytest.raises(UserError, match=r"this table is .*: it is another, or has been changed"):
        OverlaidTable(OverlaidTable(opened(folder, "disk"), overlay), overlay)  # on already
    form = RowFormat("float32", 64)
    with pytest.raises(UserError, match=r"overlay of rows = .*: the table has "):
        OverlaidTable(HostTable.allocate(form, 3), overlay)
    with pytest.raises(UserError, match="lay the overlay under a cache and not over it"):
        OverlaidTable(CachedTable(opened(folder, "disk"), 2, 4096), overlay)


@pytest.mark.parametrize(("change", "line"), [
    ({"format": "x"}, "format = .*: must be"), ({"version": "2"}, "format = .*: must be"),
    ({"base": "ab"}, "must be a number, beside the base's digest"),
    ({"dim": "9" * 5000}, "must be a number, beside"),
    ({"dim": "x"}, "dim = 'x': must be a number"), ({"dim": "32"}, "overlay rows = .*: must be"),
    ({"dtype": "fp4"}, "dtype = 'fp4': must be one of"),
])
def test_a_file_that_is_no_overlay_is_one_line(folder, overlay, tmp_path, change, line):
    path = tmp_path / "o.safetensors"
    shutil.copy(folder / "changed.safetensors", path)
    tensors = safetensors.open_tensors(path)
    safetensors.save(path, {name: tensor.read() for name, tensor in tensors.items()},
                     {**tensors.metadata, **change})
    with pytest.raises(UserError, match=line):
        read_overlay(path)


def test_ids_that_do_not_ascend_and_tables_of_another_size_are_refused(folder, overlay):
    for ids in ([3, 3], [4, 2], [-1, 2], [4, -2**63]):
        with pytest.raises(UserError, match=r"overlay ids = .*: must be ascending row ids"):
            Overlay(format=overlay.format, base=overlay.base, ids_U=np.array(ids),
                    rows_UB=overlay.rows_UB[:2])
    base, rows = opened(folder, "disk"), changed_rows(folder)
    for changed in ([rows[:-1]], [rows, rows], [rows[:, :-1]]):
        with pytest.raises(UserError, match="changed rows = "):
            difference(base, changed)


def test_ids_that_the_table_has_not_are_refused_and_change_nothing(folder):
    """On a device 2**32 + 3 would be row 3."""
    layout, form = TableLayout(rows=101, dim=4, shards=8), RowFormat("float32", 4)
    host = HostTable(form, form.pack(tables.random(101, 4)))
    table_SRD = jnp.asarray(tables.filled(layout, host.packed_RB.view(np.float32)))
    for beyond in (101, 2**32 + 3):
        overlay = Overlay(format=form, base=table_digest(host), ids_U=np.array([2, beyond]),
                          rows_UB=host.packed_RB[:2])
        for lay in (lambda laid: OverlaidTable(host, laid),
                    lambda laid: lay_on_device(layout, table_SRD, laid)):
            with pytest.raises(UserError, match=rf"overlay ids = {beyond}: .*, in 0\.\.100"):
                lay(overlay)


def test_an_overlay_is_never_written_over_one_of_its_tables(folder, tmp_path):
    for name in ("base", "changed"):
        shutil.copy(folder / "ours/tables/layer_1.fp8.table", tmp_path / f"{name}.table")
    before = (tmp_path / "base.table").read_bytes()
    (tmp_path / "link.table").symlink_to("base.table")
    for out in ("base.table", "changed.table", "link.table"):
        with pytest.raises(UserError, match="is one of the two tables, and would be written over"):
            write_difference(tmp_path / "base.table", tmp_path / "changed.table", tmp_path / out)
    assert (tmp_path / "base.table").read_bytes() == before


def test_a_table_that_did_not_change_has_an_empty_overlay(folder):
    base = opened(folder, "disk")
    overlay = difference(base, stretches(base))
    assert len(overlay.ids_U) == 0
    np.testing.assert_array_equal(rows_of(OverlaidTable(base, overlay)), rows_of(base))
