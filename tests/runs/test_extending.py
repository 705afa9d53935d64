"""A run that begins from another one and reads longer sequences: `engram-jax extend`."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from micro import STEPS, with_model, with_training, write_text

from engram_jax.cli.main import main
from engram_jax.config import YarnConfig
from engram_jax.errors import UserError
from engram_jax.inference.serving import served
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.extending import extended
from engram_jax.runs.train import train

pytestmark = pytest.mark.usefixtures("compilations")

LENGTH = 64  # the run was trained at 16


def everything(folder):
    """Each path below a folder: what is in it, and when it was written."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in Path(folder).rglob("*")}


def words(trained, out, *more):
    return ["extend", str(trained), "--length", str(LENGTH), "--out", str(out), *more]


def test_a_longer_run_begins_from_the_weights_and_leaves_the_other_as_it_was(
        trained, tmp_path, capsys):
    before, other = everything(trained), RunDirectory(trained).config()
    text = write_text(tmp_path / "other.txt", seed=5)
    command = words(trained, tmp_path / "long", "--step", "6", "--set", "training.steps=7",
                    "--set", f"data.path={text}")
    assert main(command) == 0
    assert f"begins from step 6 of {trained}" in capsys.readouterr().out
    assert everything(trained) == before
    records = RunDirectory(tmp_path / "long")
    run = records.config()
    assert run.model.attention.yarn == YarnConfig(factor=4.0, original_length=16)
    assert (run.data.sequence_length, run.data.batch_size) == (LENGTH, 1)  # as many tokens a step
    assert run.data.path == text
    assert records.tokenizer().to_str() == RunDirectory(trained).tokenizer().to_str()
    assert run.name == f"{other.name}-{LENGTH}"
    [start] = records.env()["starts"]
    assert {name: start["start_from"][name] for name in ("run", "step", "optimizer")} == {
        "run": str(trained), "step": 6, "optimizer": False}
    model = served(records)
    assert model.length == LENGTH
    model.rows.close()
    # The same command again: it is done.
    assert main(command) == 0
    assert "done before" in capsys.readouterr().out


@pytest.mark.slow
def test_the_first_step_is_that_of_the_other_runs_weights(trained, tmp_path):
    """Of a run that learns nothing the last state is the other's, table for table."""
    run = with_training(extended(trained, LENGTH), steps=1)
    run = RunDirectory(trained).config().__class__(**{
        **vars(run), "optimizer": run.optimizer.__class__(**{
            **vars(run.optimizer), "learning_rate": 1e-12})})
    train(run, tmp_path / "long", lambda line: None)
    first, last = served(RunDirectory(trained)), served(RunDirectory(tmp_path / "long"))
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(last.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    first.rows.close()
    last.rows.close()


def test_what_is_decided_and_what_may_be_set(trained):
    run = extended(trained, LENGTH, settings=[
        "model.attention.yarn.factor=10", "model.attention.yarn.mscale=1", "data.batch_size=3",
        "training.freeze=tables", "optimizer.schedule=wsd"])
    assert run.model.attention.yarn == YarnConfig(factor=10.0, original_length=16, mscale=1.0)
    assert (run.data.batch_size, run.training.freeze) == (3, "tables")
    assert run.training.steps == 1
    with_moments = extended(trained, LENGTH, step=6, optimizer=True)
    assert with_moments.training.start_optimizer
    assert with_moments.training.start_from == f"{trained}@6"
    assert with_moments.training.steps == STEPS + 1
    assert extended(trained, LENGTH, settings=["model.attention.yarn=none"]
                    ).model.attention.yarn is None


def test_an_extended_run_is_extended_from_the_first_length(trained, tmp_path):
    """Positions are stretched from the length of the first training, however often."""
    once = extended(trained, LENGTH, settings=["model.attention.yarn.factor=8",
                                               "training.freeze=tables"])
    RunDirectory(tmp_path / "once").make()
    RunDirectory(tmp_path / "once").claim(once, {}, RunDirectory(trained).tokenizer())
    assert extended(tmp_path / "once", 96).model.attention.yarn == YarnConfig(
        factor=8.0, original_length=16)
    assert extended(tmp_path / "once", 256).model.attention.yarn == YarnConfig(
        factor=16.0, original_length=16)
    assert extended(tmp_path / "once", 96).training.freeze == "", "frozen there, not here"


@pytest.mark.parametrize(("more", "line"), [
    (["--length", "16"], "length = 16: must be above the 16 tokens that micro reads"),
    (["--step", "5"], r"start_from = '.*@5': has no checkpoint of step 5; there are 6, 7"),
    (["--set", "model.attention.yarn.factor=3"],
     "yarn.factor = 3.0: reaches 48 tokens from 16, and the length is 64; it must be at least 4"),
    (["--set", "data.sequence_length=99"], "data.sequence_length = 99: is decided by extend"),
    (["--set", "model.engram.hash_seed=1"], "memory 'layer_0' = .*the model has"),
    (["--set", "model.width=48"], "has shape .*the model wants"),
    (["--set", "training.freeze=tables", "--set", "model.engram=none"],
     "training.freeze = 'tables': the model has no memory"),
    (["--set", "data.tokenizer=bpe:290"], "data.tokenizer = 'bpe:290': is decided by extend"),
    (["--length", "1000000"], "data.* = .*"),
    (["--mesh", "1x8"], "data.batch_size = 1: does not divide among the 8 devices")])
def test_what_cannot_be_extended_is_one_line(trained, tmp_path, capsys, more, line):
    before = everything(trained)
    assert main(words(trained, tmp_path / "long", *more)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert re.search(line, error), error
    assert everything(trained) == before


def test_a_folder_with_another_run_is_refused(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for out in (copy, trained):
        before = everything(out)
        assert main(words(trained, out)) == 2
        assert "choose another folder" in capsys.readouterr().err
        assert everything(out) == before
    assert main(words(tmp_path, tmp_path / "x")) == 2
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no memory"):
        with_training(with_model(RunDirectory(trained).config(), engram=None), freeze="backbone")
