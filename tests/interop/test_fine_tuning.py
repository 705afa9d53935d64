"""A run that was imported is fine-tuned: on frozen tables, or the rows that a text touches."""

import contextlib

import jax
import micro
import numpy as np
import pytest

from engram_jax.insides.observing import open_run
from engram_jax.interop.export import export_run, import_run
from engram_jax.interop.overlay import OverlaidTable, read_overlay, write_difference
from engram_jax.interop.released import stretches
from engram_jax.offload.disk import DiskTable
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.export import export_tables
from engram_jax.runs.train import train


@pytest.fixture(scope="module", name="imported")
def an_imported_run(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    export_run(trained, folder / "out")
    return import_run(folder / "out", folder / "back")


def tuned(imported, folder, freeze):
    run = RunDirectory(imported).config()
    run = micro.with_training(run, start_from=str(imported), freeze=freeze)
    train(run, folder / "tuned", lambda line: None)
    return folder / "tuned"


def rows(folder, where):
    file, = export_tables(folder, "float32", where)
    return file


def test_the_fusion_is_trained_on_frozen_tables(imported, tmp_path, compilations):
    after = open_run(RunDirectory(tuned(imported, tmp_path, "tables"))).state
    before = open_run(RunDirectory(imported)).state
    np.testing.assert_array_equal(after.tables["layer_0"], before.tables["layer_0"])
    assert any((np.asarray(one) != np.asarray(other)).any() for one, other in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(before.params), strict=True))


def test_rows_that_a_text_touches_are_an_overlay_of_the_imported_table(
        imported, tmp_path, compilations):
    run = tuned(imported, tmp_path, "backbone")
    base, changed = rows(imported, tmp_path / "base"), rows(run, tmp_path / "changed")
    write_difference(base, changed, tmp_path / "mine.safetensors")
    overlay = read_overlay(tmp_path / "mine.safetensors")
    assert len(overlay.ids_U) > 0
    with (contextlib.closing(DiskTable.open(base)) as released,
          contextlib.closing(DiskTable.open(changed)) as trained):
        laid = OverlaidTable(released, overlay)
        np.testing.assert_array_equal(np.concatenate(list(stretches(laid))),
                                      np.concatenate(list(stretches(trained))))
        same = np.setdiff1d(np.arange(released.rows), overlay.ids_U)
        np.testing.assert_array_equal(released.lookup(same), trained.lookup(same))
