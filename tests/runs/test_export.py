"""`engram-jax export` and `verify`: a run's tables as files, row for row, and what goes wrong."""

import dataclasses
import json
import resource
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import micro
import numpy as np
import object_store
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from etils import epath

from engram_jax.cli import main
from engram_jax.config import ROW_DTYPES
from engram_jax.errors import MachineError, UserError
from engram_jax.offload import checkpointed
from engram_jax.offload.checkpointed import packed_rows
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import table_info, verify
from engram_jax.offload.formats import RowFormat
from engram_jax.runs import checkpoints, export
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.export import export_tables
from engram_jax.runs.reader import open_reader
from engram_jax.tables import rounding
from engram_jax.tables.layout import TableLayout, layout_of
from engram_jax.training.placement import placed_state, single_mesh
from engram_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.fixture(scope="module", name="table")
def its_table(trained):
    """Its one table's rows, float32 [rows, dim], and the reader."""
    records = RunDirectory(trained)
    run = records.config()
    reader = open_reader(run, records.tokenizer())
    with Checkpoints(records.checkpoints, 2, reader.fingerprints()) as found:
        state = found.restore(placed_state(run, single_mesh()))
    layout = layout_of(reader.addressing.sites[0])
    rows = layout.gather(state.tables["layer_0"], jnp.arange(layout.rows))
    return np.asarray(rows), reader


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_the_file_holds_the_rows_of_the_checkpoint(trained, table, dtype):
    rows, reader = table
    path, = export_tables(trained, dtype)
    assert path == trained / "tables" / f"layer_0.{dtype}.table"
    expect = table_info(reader.addressing, "layer_0", dtype, "micro", micro.STEPS)
    found = verify(path)
    assert found == dataclasses.replace(expect, saved_ns=found.saved_ns)
    assert 0 < found.saved_ns < time.time_ns()
    home = DiskTable.open(path, expect=expect, check="read")
    form = RowFormat(dtype, rows.shape[1])
    np.testing.assert_array_equal(home.lookup(np.arange(len(rows))), form.pack(rows))
    if dtype == "float32":
        np.testing.assert_array_equal(
            jax.jit(form.unpack)(home.lookup(np.arange(len(rows)))), rows)
    home.close()


def test_the_commands(trained, tmp_path, capsys):
    assert main.main(["export", str(trained), "--format", "table", "--out", str(tmp_path)]) == 0
    path = tmp_path / "layer_0.fp8.table"
    assert f"wrote {path}: 406 rows, 7,758 bytes" in capsys.readouterr().out
    assert main.main(["verify", str(path)]) == 0
    assert f"{path}: whole; 406 rows of 8 columns in fp8" in capsys.readouterr().out
    assert main.main(["verify", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)[str(path)]["run"] == "micro"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert main.main(["verify", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"engram-jax: {path}: rows 0..405 are altered (block 0 fails its checksum); export it "
        "again, or write it again\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stretch", [1, 4000, 10**9])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("most", [checkpointed.MOST, 0], ids=["in order", "sorted on disk"])
def test_tables_are_read_a_stretch_at_a_time(tmp_path, dtype, stretch, devices, most):
    """Whatever the chunks and whoever wrote them, in the order of ids and without padding."""
    layout, form = TableLayout(rows=395, dim=6, shards=8), RowFormat("fp8", 6)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    stored = jax.device_put(layout.init(jax.random.key(0), 1.0, dtype), jax.NamedSharding(
        mesh, jax.P("fsdp")))
    place = epath.Path(tmp_path / "saved")
    with saving(chunk_byte_size=800):
        ocp.save_checkpointables(place, {"state": {"tables": {"here": stored}}})

    def pieces(name="tables.here", layout=layout, folder=tmp_path):
        return list(packed_rows(place / "state", name, layout.shape, layout.rows, form, folder,
                                stretch, most))

    rows = rounding.decode(layout.gather(stored, jnp.arange(layout.rows)))
    np.testing.assert_array_equal(np.concatenate(pieces()), form.pack(np.asarray(rows)))
    if most and devices == 1 and stretch == 4000:
        assert max(map(len, pieces())) * 6 * stored.dtype.itemsize <= stretch
    with pytest.raises(UserError, match=r"tables.here = \(8, 50, 6\): must have the shape"):
        pieces(layout=TableLayout(rows=395, dim=7, shards=8))
    with pytest.raises(MachineError, match=r"tables.there cannot be read: "):
        pieces("tables.there")
    if not most:
        with pytest.raises(MachineError, match="none: could not be written"):
            pieces(folder=tmp_path / "none")


def test_stretches_are_of_whole_chunks(tmp_path, monkeypatch):
    """So that none is read twice."""
    layout = TableLayout(rows=395, dim=6, shards=8)
    place, starts = epath.Path(tmp_path / "saved"), []
    with saving(chunk_byte_size=2000):
        ocp.save_checkpointables(place, {"state": {"tables": {
            "here": layout.init(jax.random.key(0), 1.0)}}})
    real = checkpointed._Saved.read

    def read(table, shards, rows):
        starts.append((rows.start, table.chunk[1]))
        return real(table, shards, rows)

    monkeypatch.setattr(checkpointed._Saved, "read", read)
    list(packed_rows(place / "state", "tables.here", layout.shape, layout.rows,
                     RowFormat("fp8", 6), tmp_path, 4000))
    chunk = starts[0][1]
    assert chunk > 1
    assert [start for start, _ in starts] == list(range(0, 50, 4000 // (8 * 24) // chunk * chunk))


@pytest.mark.parametrize(("rows", "devices", "size", "chunk"), [
    (120, 1, 2000, (4, 15)), (120, 1, 10**9, (4, 30)), (844, 1, 8000, (1, 211)),
    (844, 2, 8000, (1, 211)), (840, 4, 4000, (1, 105)), (844, 4, 4000, (1, 211))],
    ids=["stretches", "whole", "prime", "devices", "cut shards", "prime shards"])
def test_a_checkpoint_has_tables_in_chunks(rows, devices, size, chunk, tmp_path, monkeypatch):
    """Of at most `size` bytes if that divides them, never of a few rows; the same bits."""
    layout, form = TableLayout(rows=rows, dim=8, shards=4), RowFormat("float32", 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    table = jax.device_put(layout.init(jax.random.key(0), 1.0), jax.NamedSharding(
        mesh, jax.P("fsdp")))
    state = TrainState(step=jnp.int32(3), params={"wide": jnp.ones((64, 64))}, router_bias=[],
                       opt_state={}, tables={"here": table}, table_state={})
    monkeypatch.setattr(checkpoints, "CHUNK", size)
    with Checkpoints(epath.Path(tmp_path / "saved"), 2, {}) as found:
        found.save(3, state, SimpleNamespace(get_state=lambda: {"at": 1}))
        found.wait()
        place = found.saved_state().place
        restored = found.restore(jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            state))
    np.testing.assert_array_equal(restored.tables["here"], table)
    np.testing.assert_array_equal(restored.params["wide"], state.params["wide"])
    assert checkpointed._Saved(place, "tables.here", layout.shape).chunk == chunk
    wide = state.params["wide"]
    assert checkpointed._Saved(place, "params.wide", wide.shape).chunk == (64, 64)
    pieces = packed_rows(place, "tables.here", layout.shape, layout.rows, form, tmp_path, stretch=1)
    np.testing.assert_array_equal(
        np.concatenate(list(pieces)), form.pack(np.asarray(layout.gather(table, np.arange(rows)))))


def saving(**options):
    kind = ocp.options.ArrayOptions.Saving
    return ocp.Context(array_options=ocp.options.ArrayOptions(
        saving=kind(storage_options=kind.StorageOptions(**options))))


def test_entries_that_are_not_finite_are_not_exported(trained, tmp_path, monkeypatch):
    def rows(*arguments):
        del arguments
        yield RowFormat("fp8", 8).pack(np.full((1, 8), np.nan, np.float32))

    monkeypatch.setattr(export, "packed_rows", rows)
    with pytest.raises(UserError, match=r"layer_0, from row 0 on: entry of row 0 of 1 = nan"):
        export_tables(trained, "fp8", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        words = ["export", str(trained), "--format", "table", "--out", str(tmp_path / "full")]
        assert main.main(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.endswith("could not be written (File too large)\n")
    assert list((tmp_path / "full").iterdir()) == []


def test_what_cannot_be_exported_is_one_line(trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no run"):
        export_tables(tmp_path / "none", "fp8")
    with pytest.raises(UserError, match="table file = 'gs://bucket/x': rows are read from a local"):
        export_tables(trained, "fp8", "gs://bucket/x")
    monkeypatch.setattr(export, "reader_of", lambda records: open_reader(
        micro.with_model(records.config(), engram=None), records.tokenizer()))
    with pytest.raises(UserError, match="model = 'micro': has no memory"):
        export_tables(trained, "fp8")


def test_a_run_without_a_checkpoint(trained, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(UserError, match="has no checkpoint yet; train it first"):
        export_tables(tmp_path, "fp8")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        export_tables(tmp_path, "fp8")


def test_a_checkpoint_of_another_hash_is_refused(trained, tmp_path):
    """A config that was edited after the training."""
    (tmp_path / "run").mkdir()
    for name in ("tokenizer.json", "checkpoints"):
        (tmp_path / "run" / name).symlink_to(trained / name)
    config = json.loads((trained / "config.json").read_text())
    config["model"]["engram"]["hash_seed"] = 5
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained with another tokenizer or hash"):
        export_tables(tmp_path / "run", "fp8")
    assert not (tmp_path / "run" / "tables").exists()


def test_a_run_in_object_storage_is_exported_to_a_disk(trained, tmp_path):
    with object_store.ObjectStore() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        object_store.use(patch)
        for file in trained.rglob("*"):
            if file.is_file():
                epath.Path(f"gs://bucket/run/{file.relative_to(trained)}").write_bytes(
                    file.read_bytes())
        with pytest.raises(UserError, match="table file = 'gs://bucket/run/tables'"):
            export_tables("gs://bucket/run", "fp8")
        path, = export_tables("gs://bucket/run", "fp8", tmp_path)
    other, = export_tables(trained, "fp8")
    assert path.read_bytes() == other.read_bytes()
