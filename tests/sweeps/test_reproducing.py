"""A run is trained again from its record: the same bits, or the first number that differs."""

import json
import math
import shutil

import pytest
from micro import STEPS, micro, plain, with_model, with_training, write_text

from engram_jax.cli import main
from engram_jax.errors import UserError
from engram_jax.runs import train
from engram_jax.runs.directory import RunDirectory
from engram_jax.sweeps import reproducing
from engram_jax.sweeps.reproducing import compared, reproduce
from engram_jax.training.placement import single_mesh

pytestmark = pytest.mark.usefixtures("compilations")


def silent(line):
    del line


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A finished run and its reproduction."""
    place = tmp_path_factory.mktemp("trained") / "run"
    train.train(plain(micro(text, evaluate_every=3)), place, silent)
    return place, reproduce(place, say=silent)


@pytest.fixture
def copy(trained, tmp_path):
    """The two folders again, to be changed."""
    place = tmp_path / "run"
    shutil.copytree(trained[0], place)
    config = json.loads((place / "reproduction" / "config.json").read_text())
    config["data"]["tokenizer"] = str(place / "tokenizer.json")
    (place / "reproduction" / "config.json").write_text(json.dumps(config))
    return place


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_step(place, step, name, value):
    path = place / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    [row] = [row for row in rows if row["step"] == step and name in row]
    before, row[name] = row[name], value(row[name])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return before, row[name]


def test_a_run_is_reproduced_to_the_bit(trained):
    place, found = trained
    before, again = RunDirectory(place), RunDirectory(place / "reproduction")
    assert found.same
    assert found.steps == STEPS
    assert found.environment == []
    for name in ("loss", "bits_per_byte"):
        assert again.result()[name] == before.result()[name]
    losses = [[row["learning/loss"] for row in records.metrics() if "learning/loss" in row]
              for records in (before, again)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    assert str(found) == (f"the same to the bit: {STEPS} logged steps and the validation loss "
                          f"{before.result()['loss']!r}")


def test_another_number_in_the_record_is_found(copy, capsys):
    then, now = change_step(
        copy, 5, "learning/loss", lambda value: math.nextafter(value, 0.0))
    assert main.main(["reproduce", str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"the first difference: step 5: learning/loss was {now!r} and is {then!r}" in out
    assert "validation loss was" in out


def test_another_evaluation_in_the_record_is_found(copy):
    change_step(copy, 3, "evaluation/loss", lambda value: value + 1e-9)
    found = reproduce(copy, say=silent)
    assert (found.difference.step, found.difference.name) == (3, "evaluation/loss")


def test_another_result_is_found(copy):
    change(copy / "result.json", loss=1.0)
    found = reproduce(copy, say=silent)
    assert found.difference is None
    assert not found.same
    assert "validation loss was 1.0 and is" in str(found)


def test_another_seed_differs_from_the_first_step_on(copy):
    config = json.loads((copy / "config.json").read_text())
    config["training"]["seed"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    found = reproduce(copy, copy.parent / "again", silent)
    assert found.difference.step == 1
    assert found.loss != found.loss_before


def test_what_differs_of_the_environment_is_named(copy, capsys):
    packages = json.loads((copy / "env.json").read_text())["packages"]
    change(copy / "env.json", git="0123+changes", devices=["gpu:H200"] * 8,
           packages={**packages, "jax": "0.1"}, command=["another"])
    assert main.main(["reproduce", str(copy), "--mesh", "1x1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "environment: " in line]
    assert [line.split()[1] for line in lines] == ["devices:", "git:", "packages.jax:"]
    assert "8 x gpu:H200, 8 x cpu:cpu" in lines[0]
    assert f"0.1, {packages['jax']}" in lines[2]


def test_the_mesh_is_the_recorded_one(copy):
    change(copy / "env.json", mesh="3x5")
    with pytest.raises(UserError, match="mesh = '3x5': needs 15 devices"):
        reproduce(copy, copy.parent / "again", silent)


def test_the_parts_of_a_step_are_the_recorded_ones(text, tmp_path, monkeypatch):
    """As many as fitted there, though here another number would."""
    run = with_training(with_model(plain(micro(text)), remat="auto"), accumulate=0, steps=2)
    monkeypatch.setattr("engram_jax.training.fitting.total_bytes", lambda: 1)
    train.train(run, tmp_path / "run", silent, single_mesh())
    monkeypatch.undo()
    assert reproduce(tmp_path / "run", say=silent).same
    again = RunDirectory(tmp_path / "run" / "reproduction").config()
    assert (again.training.accumulate, again.model.remat) == (4, "block")


def test_what_cannot_be_reproduced(copy, text, tmp_path):
    with pytest.raises(UserError, match=r"out = .*: is the run's own folder"):
        reproduce(copy, copy)
    other = write_text(tmp_path / "other.txt", seed=3)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["path"] = other
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"data.path = .*other.txt': is no longer the text"):
        reproduce(copy, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (copy / "result.json").unlink()
    with pytest.raises(UserError, match=r"run: is not done; the command that began it goes on"):
        reproduce(copy)


def test_rows_that_one_of_the_two_lacks():
    rows = [{"step": 1, "a": 1.0, "perf/s": 1.0}, {"step": 2, "a": math.nan}]
    assert compared(rows, [{"step": 1, "a": 1.0, "perf/s": 9.0}, rows[1]]) == (2, None)
    found = compared(rows, rows[:1])
    assert str(found[1]).startswith("step 2: a was nan and is not logged")
    assert compared(rows[:1], [{"step": 1, "a": 1.0, "b": 2.0}])[1] == reproducing.Difference(
        step=1, name="b", before=None, now=2.0)
