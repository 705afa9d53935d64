"""`analyze`: every analysis of trained runs from the command line, and what it refuses."""

import json

import numpy as np
import pytest
from micro import micro, plain, with_model, write_text

from engram_jax import cli
from engram_jax.arguments import ANALYSES as NAMES
from engram_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run with memory, one without, and one with another tokenizer."""
    place = tmp_path_factory.mktemp("analyses")
    base = plain(micro(write_text(place / "text.txt"), name="memory"))
    other = micro(write_text(place / "other.txt", seed=1), name="other")
    runs = {"memory": base, "bare": with_model(base, engram=None),
            "other": with_model(plain(other), engram=None)}
    for name, run in runs.items():
        train(run.__class__(**{**vars(run), "name": name}), place / name, lambda line: None)
    return place


def found(capsys, *words):
    assert cli.main(list(map(str, words))) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert cli.main(list(map(str, words))) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


@pytest.mark.parametrize("what", NAMES)
def test_every_analysis_of_a_run_is_json(folders, what, capsys):
    values = found(capsys, "analyze", what, folders / "memory")
    assert values


def test_the_lens_sets_runs_side_by_side(folders, capsys):
    values = found(capsys, "analyze", "lens", folders / "memory", folders / "bare",
                   "--text", folders / "other.txt")
    assert list(values) == ["memory", "bare"]
    assert values["memory"] == values["bare"] == [0.0], "one block, the last"


def test_a_run_is_like_itself(folders, capsys):
    values = found(capsys, "analyze", "cka", folders / "memory")
    np.testing.assert_allclose(values["with"]["memory"]["cka"], [[1.0]], rtol=1e-6)
    values = found(capsys, "analyze", "cka", folders / "memory", folders / "bare")
    assert 0 < values["with"]["bare"]["cka"][0][0] < 1


def test_a_memory_is_used_as_its_ids_say(folders, capsys):
    orders = found(capsys, "analyze", "memory", folders / "memory")["memory"]["layer_0"]["orders"]
    assert set(orders) == {"2", "3"}
    for order in orders.values():
        assert 0 < order["touched"] <= order["rows"]
        assert order["cache_hit_rates"] == sorted(order["cache_hit_rates"])


def test_findings_go_into_a_folder(folders, capsys, tmp_path):
    assert cli.main(["analyze", "tokenizer", str(folders / "memory"), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "tokenizer.json").read_text())["memory"]["raw"] == 300
    assert capsys.readouterr().out == ""


def test_what_cannot_be_looked_at(folders, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("ka")
    (tmp_path / "bytes.txt").write_bytes(b"ka\xff")
    memory, bare, other = (folders / name for name in ("memory", "bare", "other"))
    for words, said in (
        (("gates", bare), "run = 'bare': has no Engram"),
        (("cka", memory, other), "run = 'other': has another tokenizer than memory"),
        (("lens", memory, memory), "run = ['memory', 'memory']: must have different names"),
        (("lens", memory, "--text", tmp_path / "none.txt"), "must be a text file"),
        (("lens", memory, "--text", tmp_path / "bytes.txt"), "is not UTF-8"),
        (("lens", memory, "--text", tmp_path / "short.txt"), "text = '1 tokens': must have at"),
        (("lens", tmp_path), "holds no run"),
    ):
        assert said in refused(capsys, "analyze", *words)
    (folders / "half").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folders / "half" / name).write_bytes((memory / name).read_bytes())
    assert "checkpoint" in refused(capsys, "analyze", "lens", folders / "half")
