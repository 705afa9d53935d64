"""`evaluate` uses the mesh: what no single device could hold, eight do."""

import collections
import json

import jax
import pytest
from micro import micro, plain, with_data, with_model, write_text

from engram_jax.cli import main
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.runs import checkpoints
from engram_jax.runs.train import train
from engram_jax.settings import changed
from engram_jax.training import placement
from engram_jax.training.state import to_be_read
from engram_jax.training.step import evaluation_step

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of one step whose table is nearly all of its state, and the run's folder."""
    folder = tmp_path_factory.mktemp("large")
    run = changed(with_model(plain(with_data(
        micro(write_text(folder / "text.txt"), steps=1, evaluate_batches=2), batch_size=8)),
        width=16), {"model.engram.rows_per_head": (40_000, 40_000), "model.engram.shards": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGRAM_CACHE", str(folder / "cache"))
        train(run, folder / "run", lambda line: None, placement.make_mesh(1, 8))
    return run, folder / "run"


def bytes_of_devices(tree):
    held = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return held


@pytest.mark.slow
def test_a_state_that_no_device_could_hold_is_evaluated_on_eight(large, capsys, monkeypatch):
    """The limit of a device is a fifth of the state. Restored are the weights and the table alone,
    in eight parts, and the program needs no more than that."""
    run, folder = large
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
        placement.placed_state(run, placement.single_mesh())))
    limit, restored = whole // 5, []
    restore = checkpoints.Checkpoints.restore
    monkeypatch.setattr(checkpoints.Checkpoints, "restore", lambda *args, **words: restored.append(
        restore(*args, **words)) or restored[-1])
    assert main.main(["evaluate", str(folder), "--json", "--mesh", "1x8"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["loss"] == json.loads((folder / "result.json").read_text())["loss"]
    held = bytes_of_devices(to_be_read(restored[0]))
    assert len(held) == 8
    state = to_be_read(placement.placed_state(run, placement.make_mesh(1, 8)))
    batch = {name: jax.ShapeDtypeStruct((8, 16), dtype) for name, dtype in (
        ("tokens_BT", "int32"), ("targets_BT", "int32"), ("starts_BT", "bool"),
        ("weights_BT", "float32"))}
    addressing = address(run.model, CompressedVocabulary.identity(run.model.vocab_size), 0)
    memory = jax.jit(evaluation_step(run, addressing, placement.make_mesh(1, 8))).lower(
        state, batch).compile().memory_analysis()
    assert max(held.values()) <= memory.argument_size_in_bytes
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < limit
    assert main.main(["evaluate", str(folder), "--json", "--mesh", "1x1"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(answer["loss"], abs=1e-5)
    assert max(bytes_of_devices(to_be_read(restored[1])).values()) > limit, "one device holds all"


@pytest.mark.slow
def test_where_all_devices_do_not_divide_a_run_one_evaluates_it(large, monkeypatch):
    run, _ = large
    monkeypatch.delenv("ENGRAM_MESH")
    assert placement.shape_of(placement.reading_mesh(run)) == "1x8"
    odd = with_data(run, batch_size=3)
    assert placement.shape_of(placement.reading_mesh(odd)) == "1x1"
    assert placement.shape_of(placement.reading_mesh(odd, "1x2")) == "1x2"
