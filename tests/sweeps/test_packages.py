"""The text of source code that others can rebuild."""

import importlib.metadata
import json
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
    wanted = pins(tmp_path, f"packaging=={VERSION}  # one", 'nothing==1; python_version < "3"')
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


def test_other_packages_than_the_pinned_ones_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "PINS", pins(tmp_path, "packaging==0.1"))
    wrong = f"packaging = {VERSION!r}: is not what requirements.txt pins, 0.1"
    with pytest.raises(packages.UserError, match=wrong.replace(".", r"\.")):
        packages.write(tmp_path / "a.jsonl", packages.PINS)
    missing = pins(tmp_path, "no-such-package==1")
    with pytest.raises(packages.UserError, match="no-such-package: is not installed"):
        packages.pinned(missing)
    assert not (tmp_path / "a.jsonl").exists()
    assert packages.main([]) == 2
    assert capsys.readouterr().err == "python -m experiments.packages FILE.jsonl\n"
