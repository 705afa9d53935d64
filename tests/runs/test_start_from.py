"""What may change when a run goes on, and a run that begins from another one."""

import shutil

import jax
import numpy as np
import pytest
from micro import STEPS, with_data, with_model, with_optimizer, with_training, write_text

from engram_jax.errors import UserError
from engram_jax.runs import train
from engram_jax.runs.beginning import parsed
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import open_inputs
from engram_jax.settings import changed
from engram_jax.training.placement import placed_state, single_mesh

pytestmark = pytest.mark.usefixtures("compilations")


def silent(line):
    del line


@pytest.fixture(scope="module")
def run(trained):
    return RunDirectory(trained).config()


@pytest.fixture
def stopped(trained, tmp_path):
    """A run that was stopped after its checkpoint of step 6, of 7."""
    shutil.copytree(trained, tmp_path / "stopped")
    (tmp_path / "stopped" / "result.json").unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "7")
    return tmp_path / "stopped"


def losses(directory):
    return {row["step"]: row["learning/loss"] for row in RunDirectory(directory).metrics()
            if "learning/loss" in row}


def state_of(run, directory, step=None):
    records = RunDirectory(directory)
    with Checkpoints(records.checkpoints, 1, open_inputs(run).fingerprints()) as checkpoints:
        return checkpoints.restore(placed_state(run, single_mesh()), step=step)


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- What may change on the way ---


def test_what_changes_no_bit_may_change_on_the_way(run, trained, stopped, tmp_path):
    other = with_data(
        with_training(run, log_every=2, checkpoint_every=2, evaluate_every=5, keep_checkpoints=5,
                      grace_seconds=5.0, skips_in_a_row=1), cache_dir=str(tmp_path / "cache"))
    train.train(other, stopped, silent)
    records = RunDirectory(stopped)
    assert records.result()["loss"] == RunDirectory(trained).result()["loss"]
    assert losses(stopped) == losses(trained)
    assert records.config() == other
    assert train.train(run, stopped, silent) == records.result()


@pytest.mark.parametrize("change", [
    lambda run: with_training(run, steps=9), lambda run: with_training(run, seed=1),
    lambda run: with_data(run, batch_size=8), lambda run: with_optimizer(run, learning_rate=0.5),
    lambda run: with_training(run, evaluate_batches=1), lambda run: with_model(run, width=48),
    lambda run: with_training(run, start_from="x")])
def test_what_changes_a_bit_is_a_new_run_in_words_that_say_so(run, stopped, change):
    with pytest.raises(UserError, match=r"holds a run with .* changes what is trained; choose "
                       r"another folder, where training.start_from=.*stopped begins from this"):
        train.train(change(run), stopped, silent)


# --- From another run ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long", "short"])
def test_a_run_that_is_extended_is_the_longer_one(run, tmp_path, name):
    flat = with_optimizer(run, schedule="wsd", decay_share=0.3, warmup_steps=2)
    # In its last steps the rate of the short run falls; its checkpoint of step 3 is before them.
    short = with_training(flat, keep_checkpoints=9)
    long, said = with_training(short, steps=11), []
    train.train(long, tmp_path / "long", silent)
    if name == "short":
        train.train(short, tmp_path / "short", silent)
    train.train(with_training(long, start_from=f"{tmp_path / name}@3", start_optimizer=True),
                tmp_path / "from", said.append)
    assert any("begins from step 3 of" in line and "and its place in the data" in line
               for line in said)
    longer = {step: loss for step, loss in losses(tmp_path / "long").items() if step > 3}
    if name == "long":
        assert losses(tmp_path / "from") == longer
        assert leaves(state_of(long, tmp_path / "from")) == leaves(
            state_of(long, tmp_path / "long"))
    else:  # another number of steps is another program, which compilers round otherwise
        assert losses(tmp_path / "from") == pytest.approx(longer, abs=1e-4)
    [start] = RunDirectory(tmp_path / "from").env()["starts"]
    assert start["start_from"] == {**start["start_from"], "run": str(tmp_path / name), "step": 3,
                                   "optimizer": True, "data": True}


@pytest.mark.parametrize("freeze", ["tables", "backbone", ""])
def test_weights_are_taken_over_and_what_is_frozen_does_not_move(run, trained, tmp_path, freeze):
    mine = with_training(run, start_from=f"{trained}@7", freeze=freeze)
    train.train(mine, tmp_path, silent)
    before, after = state_of(run, trained), state_of(run, tmp_path)
    tables = leaves(before.tables), leaves(after.tables)
    assert (tables[0] == tables[1]) == (freeze == "tables")
    old, new = leaves(before.params), leaves(after.params)
    same = {name for name in old if old[name] == new[name]}
    assert same == ({name for name in old if "engram" not in name} if freeze == "backbone"
                    else set())
    assert int(after.step) == STEPS
    assert losses(tmp_path)[1] < losses(trained)[1] - 0.5
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_second_start_begins_from_the_same_checkpoint(run, stopped, tmp_path, trained,
                                                        monkeypatch):
    mine = with_training(run, start_from=str(stopped), checkpoint_every=0)

    def refuses(*words):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(train.placement, "put", refuses)
        with pytest.raises(ZeroDivisionError):
            train.train(mine, tmp_path / "new", silent)
    shutil.copytree(trained / "checkpoints" / "7", stopped / "checkpoints" / "7")
    said = []
    train.train(mine, tmp_path / "new", said.append)
    assert any("begins from step 6 of" in line for line in said)


def test_what_cannot_be_begun_from_is_refused_by_name(run, trained, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=3)
    seeded = {"engram": run.model.engram.__class__(**{**vars(run.model.engram), "hash_seed": 1})}
    begins = with_training(run, start_from=str(trained))
    for mine, line in (
            (with_data(begins, path=other), "another tokenizer or hash"),
            (with_model(begins, **seeded), "memory 'layer_0' = .*; the model has"),
            (with_model(begins, width=48), "has shape .*the model wants"),
            (with_training(begins, start_from=f"{trained}@5"), "no checkpoint of step 5"),
            (with_training(begins, start_from=str(tmp_path)), "holds no run"),
            (with_training(begins, start_optimizer=True, steps=7), "must be above 7")):
        with pytest.raises(UserError, match=line):
            train.train(mine, tmp_path / "new", silent)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)  # some are refused before it is made


@pytest.mark.parametrize("whole", [
    pytest.param(False, id="weights"),
    pytest.param(True, id="and optimizer", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("theirs", "mine"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_tables_of_another_dtype_are_refused_and_not_cast(run, trained, tmp_path, theirs, mine,
                                                          whole):
    if theirs == "bfloat16":
        trained = tmp_path / "bfloat16"
        train.train(changed(run, {"model.engram.table_dtype": theirs}), trained, silent)
    begins = changed(run, {"model.engram.table_dtype": mine, "training.steps": 2 * STEPS,
                           "training.start_from": str(trained),
                           "training.start_optimizer": whole})
    with pytest.raises(UserError, match=r"^training.start_from = .*tables.layer_0 has dtype .*, "
                       rf"the model wants .*; set model.engram.table_dtype to '{theirs}', as "):
        train.train(begins, tmp_path / "new", silent)


def test_names_of_runs():
    assert parsed("runs/a@12") == ("runs/a", 12)
    assert parsed("gs://b/run@x") == ("gs://b/run@x", None)
    assert parsed("runs/a") == ("runs/a", None)


@pytest.mark.parametrize(("fields", "line"), [
    ({"freeze": "all"}, "training.freeze = 'all': must be"),
    ({"start_optimizer": True}, "training.start_optimizer = True: needs training.start_from")])
def test_settings_that_mean_nothing(run, fields, line):
    with pytest.raises(UserError, match=line):
        with_training(run, **fields)
