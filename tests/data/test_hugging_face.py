"""Datasets of the Hugging Face hub, streamed."""

import sys
import types

import pytest
from texts import changed, documents

from engram_jax.data import sources, tokens
from engram_jax.errors import MachineError, UserError

COMMIT = "0123456789abcdef" * 2 + "01234567"
ROWS = [{"text": "one", "id": 1}, {"text": " ", "id": 2}, {"text": "two", "id": 3},
        {"text": "three", "id": 4}]


class Rows:
    """As much of datasets.IterableDataset as is used; notes how many rows were asked for."""

    def __init__(self, rows, read, column_names=("text", "id")):
        self.rows, self.read, self.column_names = rows, read, column_names
        self.info = types.SimpleNamespace(
            splits={"train": types.SimpleNamespace(num_examples=len(ROWS))})

    def __iter__(self):
        for row in self.rows:
            self.read.append(row)
            if row is None:
                raise ConnectionError("the network\nis gone")
            yield row

    def select_columns(self, names):
        return Rows([row and {name: row[name] for name in names} for row in self.rows], self.read)

    def skip(self, count):
        return Rows(self.rows[count:], self.read)

    def take(self, count):
        return Rows(self.rows[:count], self.read)


@pytest.fixture
def library(monkeypatch):
    """Stand-ins for the datasets library and the hub that note what they are asked for."""
    module, hub = types.ModuleType("datasets"), types.ModuleType("huggingface_hub")
    module.calls, module.read, module.rows, hub.sha = [], [], ROWS, COMMIT

    def load_dataset(name, config, *, split, streaming, revision):
        assert streaming
        module.calls.append((name, config, split, revision))
        if name == "nobody/nothing":
            raise FileNotFoundError("Couldn't find it\non the hub")
        return Rows(module.rows, module.read, None if name == "un/known" else ("text", "id"))

    class HfApi:
        def dataset_info(self, name, revision):
            if hub.sha is None:
                raise ConnectionError("no network")
            return types.SimpleNamespace(sha=hub.sha)

    module.load_dataset, hub.HfApi, module.hub = load_dataset, HfApi, hub
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return module


def test_hugging_face_names(settings, library):
    for path in ("hf:a/b", "hf:a/b:test", "hf:a/b:en:test", "hf:un/known"):
        assert documents(settings, path) == ["one", "two", "three"]
    assert library.calls == [("a/b", None, "train", COMMIT), ("a/b", None, "test", COMMIT),
                             ("a/b", "en", "test", COMMIT), ("un/known", None, "train", COMMIT)]


@pytest.mark.parametrize(("rows", "texts"), [
    ("[:1]", ["one"]), ("[2:]", ["two", "three"]), ("[1:3]", ["two"]), ("[3:1]", []),
    ("[:50%]", ["one"]), ("[75%:]", ["three"]), ("[:]", ["one", "two", "three"]),
])
def test_some_rows_of_a_split(settings, library, rows, texts):
    assert documents(settings, f"hf:a/b:train{rows}") == texts
    if rows == "[:1]":
        assert len(library.read) == 1


def test_rows_are_read_as_they_are_wanted_and_not_before(settings, library):
    texts = sources.open_source(changed(settings, path="hf:a/b")).documents()
    assert library.read == []
    assert next(texts) == "one"
    assert len(library.read) == 1


def test_a_revision_is_pinned_and_recorded(settings, library):
    data = tokens.open_tokens(changed(settings, path="hf:a/b", revision="v1.0"))
    assert library.calls == [("a/b", None, "train", COMMIT)]
    assert data.revision == COMMIT
    other = "f" * 40
    source = sources.open_source(changed(settings, path="hf:a/b", revision=other))
    assert source.revision == other
    with pytest.raises(UserError, match=r"^data\.revision = 'v1': is of a data set hf:NAME"):
        changed(settings, revision="v1")


def test_a_pinned_dataset_is_read_once(settings, library):
    config = changed(settings, path="hf:a/b")
    first = tokens.open_tokens(config)
    assert len(library.read) == len(ROWS)
    assert tokens.open_tokens(config) == first
    assert len(library.read) == len(ROWS)
    library.hub.sha, library.rows = "f" * 40, [*ROWS, {"text": "four", "id": 5}]
    assert tokens.open_tokens(config).fingerprint != first.fingerprint


def test_without_a_commit_it_is_read_at_every_start(settings, library):
    library.hub.sha = None
    config = changed(settings, path="hf:a/b", revision="main")
    first = tokens.open_tokens(config)
    assert library.calls == [("a/b", None, "train", "main")]
    assert tokens.open_tokens(config) == first
    assert len(library.read) == 2 * len(ROWS)


def test_a_source_that_fails_and_comes_back(settings, library):
    config = changed(settings, path="hf:a/b")
    library.rows = [*ROWS[:2], None, *ROWS[2:]]
    with pytest.raises(MachineError, match=r"^data\.path = 'hf:a/b': could not be read from row 2 "
                                           r"on \(ConnectionError: the network\)$"):
        tokens.open_tokens(config)
    library.rows = ROWS
    assert tokens.open_tokens(config).documents == 3


@pytest.mark.parametrize(("path", "field", "message"), [
    ("hf:", "text", "must be hf:NAME"),
    ("hf:a:b:c:d", "text", "must be hf:NAME"),
    ("hf:a:train[1]", "text", "must be hf:NAME"),
    ("hf:a:train[-5:]", "text", "must be hf:NAME"),
    ("hf:nobody/nothing", "text", "FileNotFoundError: Couldn't find it$"),
    ("hf:a/b:test[:10%]", "text", "does not say how many rows it has"),
    ("hf:a/b", "body", r"data\.text_field = 'body': .*it has 'text', 'id'$"),
    ("hf:a/b", "id", r"data\.text_field = 'id': row 0 of a/b holds int"),
])
def test_hugging_face_errors(settings, library, path, field, message):
    with pytest.raises(UserError, match=message) as caught:
        documents(settings, path, text_field=field)
    assert "\n" not in str(caught.value)


def test_hugging_face_without_the_library(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install engram_jax\[datasets\]"):
        documents(settings, "hf:a/b")


def test_hugging_face_for_real(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert documents(settings, f"hf:{tmp_path / 'set'}") == ["one", "two"]
