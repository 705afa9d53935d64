"""The text of source code that others can rebuild."""

import importlib.metadata
import json
import platform
import re
import types

import pytest

from engram_jax.config import DataConfig
from engram_jax.data.sources import open_source
from experiments import packages

VERSION = importlib.metadata.version("packaging")


@pytest.fixture(autouse=True)
def a_small_standard_library(monkeypatch):
    """Two files, of which one is there twice."""
    texts = ["import this\n", "x = 1\n", "import this\n", " \n"]
    monkeypatch.setattr(packages, "open_source",
                        lambda config: types.SimpleNamespace(documents=lambda: iter(texts)))


def pins(tmp_path, *lines):
    path = tmp_path / "requirements.txt"
    path.write_text("# pins\n" + "\n".join(lines) + "\n")
    return path


def test_the_text_is_the_same_each_time_and_no_document_is_there_twice(tmp_path):
    wanted = pins(tmp_path, f"python=={platform.python_version()}", f"packaging=={VERSION}  # one")
    record = packages.write(tmp_path / "a.jsonl", wanted)
    assert record["packages"] == {"packaging": VERSION}
    again = packages.write(tmp_path / "b.jsonl", wanted)
    assert record == again
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert json.loads((tmp_path / "a.jsonl.json").read_text()) == record
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows[:2]] == ["stdlib/0000", "stdlib/0001"]
    assert "packaging/packaging/version.py" in [row["path"] for row in rows]
    assert len({row["text"] for row in rows}) == len(rows) == record["documents"]
    texts = list(open_source(DataConfig(path=str(tmp_path / "a.jsonl"))).documents())
    assert texts == [row["text"] for row in rows]


def test_other_packages_than_those_of_the_list_are_refused_all_at_once(tmp_path, monkeypatch,
                                                                       capsys):
    wanted = pins(tmp_path, "packaging==0.1", f"pytest=={pytest.__version__}", "no-such-package==1")
    monkeypatch.setattr(packages, "PINS", wanted)
    wrong = ("packaging==0.1, no-such-package==1: not here, or in another version; "
             "python -m pip install --no-deps packaging==0.1 no-such-package==1")
    with pytest.raises(packages.UserError, match=re.escape(wrong)):
        packages.write(tmp_path / "a.jsonl", wanted)
    other = pins(tmp_path, "python==3.0")
    with pytest.raises(packages.UserError, match=r"python = '3[.0-9]*': is not what .* names"):
        packages.write(tmp_path / "a.jsonl", other)
    assert not (tmp_path / "a.jsonl").exists()
    assert packages.main([]) == 2
    assert capsys.readouterr().err == "python -m experiments.packages FILE.jsonl\n"


def test_another_text_than_the_committed_results_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    wanted = pins(tmp_path, f"packaging=={VERSION}")
    record = packages.write(tmp_path / "a.jsonl", wanted)
    monkeypatch.setattr(packages, "write", lambda path: record)
    assert packages.main([str(tmp_path / "b.jsonl")]) == 1
    assert f"not the text of the committed results, sha256 {packages.SHA256}" in (
        capsys.readouterr().err)
    monkeypatch.setattr(packages, "SHA256", record["sha256"])
    assert packages.main([str(tmp_path / "b.jsonl")]) == 0
    assert record["sha256"] in capsys.readouterr().out


def test_the_page_and_the_command_know_the_same_text():
    page = (packages.PINS.parent / "tokens" / "README.md").read_text()
    assert packages.SHA256 in page
    lines = packages.PINS.read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.pop("python") in page
    assert len(pinned) == 88
    assert pinned["chex"] == "0.1.92"
