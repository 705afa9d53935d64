"""A run of an older version still opens: its checkpoint, its text, its loss."""

import json
import pathlib
import shutil

import pytest

from engram_jax.cli.main import main

OLD = sorted((pathlib.Path(__file__).parents[1] / "golden").glob("run_*_*_*/config.json"))


@pytest.mark.parametrize("config", OLD, ids=lambda path: path.parent.name)
def test_it_is_evaluated_to_the_loss_that_it_recorded(config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(config.parent, run)
    shutil.copy(f"{config.parent}.txt", tmp_path / json.loads(config.read_text())["data"]["path"])
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    recorded = json.loads((run / "result.json").read_text())
    assert said["tokens"] == recorded["validation_tokens"]
    assert said["loss"] == pytest.approx(recorded["loss"], rel=1e-6)


def test_there_is_one():
    assert OLD
