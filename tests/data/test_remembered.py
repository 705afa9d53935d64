"""A start does not read a text that has not changed, and notices one that has."""

import json
import os
import time

import pytest
from texts import changed, documents, prose, write_documents

from engram_jax.data import remembered, sources, tokens
from engram_jax.errors import UserError


@pytest.fixture
def old(settings, monkeypatch):
    """The settings; their text was written long before any test, as `settled` sees it."""
    monkeypatch.setattr(remembered, "SETTLED_NS", 0)
    return settings


def unread(monkeypatch):
    def refused(self):
        raise AssertionError("the text is read again")

    monkeypatch.setattr(sources.Source, "parts", refused)


@pytest.mark.parametrize("own", [True, False])
def test_a_text_that_has_not_changed_is_not_read(old, monkeypatch, tmp_path, own):
    if not own:
        first = tokens.open_tokens(old)
        old = changed(old, tokenizer=str(os.path.join(first.directory, "tokenizer.json")),
                      validation_fraction=0.2)
    first = tokens.open_tokens(old)
    unread(monkeypatch)
    assert tokens.open_tokens(old) == first
    assert tokens.open_tokens(changed(old, seed=3, sequence_length=8)) == first
    with pytest.raises(AssertionError, match="read again"):
        tokens.open_tokens(changed(old, cache_dir=str(tmp_path / "other")))


@pytest.mark.parametrize("change", ["same size", "time kept", "file", "name", "field"])
def test_a_text_that_has_changed_is_noticed(old, tmp_path, change):
    first = tokens.open_tokens(old)
    file = tmp_path / "text" / "0007.txt"
    before, status = file.read_text(), file.stat()
    if change in ("same size", "time kept"):
        file.write_text(before[::-1])
        if change == "time kept":  # as by programs that copy with times
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "file":
        (tmp_path / "text" / "more.txt").write_text("more")
    elif change == "name":
        file.rename(tmp_path / "text" / "zzzz.txt")
    else:
        old = changed(old, text_field="body")
    again = tokens.open_tokens(old)
    assert (again.fingerprint == first.fingerprint) == (change == "field")


def test_a_file_of_this_moment_is_not_trusted(settings, monkeypatch, tmp_path):
    tokens.open_tokens(settings)
    assert not (tmp_path / "cache" / "texts").exists()
    now = time.time_ns() + remembered.SETTLED_NS
    monkeypatch.setattr(remembered.time, "time_ns", lambda: now)
    tokens.open_tokens(settings)
    unread(monkeypatch)
    tokens.open_tokens(settings)


def test_a_text_that_changes_while_it_is_read_is_not_remembered(old, monkeypatch, tmp_path):
    stamps = iter([[1], [2]])
    monkeypatch.setattr(remembered, "stamp", lambda source: next(stamps))
    tokens.open_tokens(old)
    assert not (tmp_path / "cache" / "texts").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"fingerprint": 1, "trained_on": "a"}',
                                     '{"fingerprint": "a"}', '{"other": "a"}'])
def test_a_damaged_note_is_read_over(old, tmp_path, content):
    first = tokens.open_tokens(old)
    note, = (tmp_path / "cache" / "texts").iterdir()
    note.write_text(content)
    assert tokens.open_tokens(old) == first
    assert json.loads(note.read_text())["fingerprint"] == first.fingerprint


def test_mixtures_and_packed_files_are_remembered(old, monkeypatch, tmp_path):
    more = write_documents(tmp_path / "more", [prose(seed, 30) for seed in range(50)])
    config = changed(old, mixture=(f"{old.path}=1", f"{more}=2"))
    first = tokens.open_tokens(config)
    with monkeypatch.context() as patch:
        unread(patch)
        assert tokens.open_tokens(config) == first
    other = changed(config, mixture=(f"{old.path}=1", f"{more}=1"))
    assert len(documents(other, "unused")) != first.documents


def test_a_text_that_is_gone(old, tmp_path):
    tokens.open_tokens(old)
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="holds no documents"):
        tokens.open_tokens(old)
