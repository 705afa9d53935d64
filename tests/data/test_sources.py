"""Text from anywhere: every kind of source, and what is no text."""

import contextlib
import gzip
import hashlib
import inspect
import os
import sys
import sysconfig

import numpy as np
import pytest
from etils import epath
from texts import changed, documents, write_documents

from engram_jax.data import read_ahead, reading, sources, tokens
from engram_jax.errors import MachineError, UserError


def test_stdlib_is_python_source_in_a_fixed_order(monkeypatch, tmp_path, settings):
    for path, data in {"b.py": b"b = 1", "a/z.py": b"z = 1", "a/__init__.py": b"", "c.txt": b"no",
                       "latin.py": b"# \xe9", "test/t.py": b"no", "a/tests/t.py": b"no",
                       "site-packages/p.py": b"no", "a/__pycache__/q.py": b"no",
                       "a.py": b"a = 1"}.items():
        file = tmp_path / "lib" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    assert documents(settings, "stdlib") == ["z = 1", "a = 1", "b = 1"]


def test_the_real_stdlib_is_there(settings):
    text = sources.open_source(changed(settings, path="stdlib")).documents()
    assert sum(len(next(text)) for _ in range(20)) > 10_000


def test_a_text_file_is_one_document(tmp_path, settings):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntw\xc3\xb6\n")
    assert documents(settings, tmp_path / "a.txt") == ["one\r\n\ntwö\n"]


def test_a_folder_is_read_below_and_in_order(tmp_path, settings):
    folder = tmp_path / "f"
    for path in ("b.md", "a/2.txt", "a/10.txt", ".git/x", "a/.hidden", "empty.txt", "blank.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text({"empty.txt": "", "blank.txt": " \n"}.get(path, path))
    (folder / "c.jsonl").write_text('{"text": "row"}\n')
    assert documents(settings, folder) == ["a/10.txt", "a/2.txt", "b.md", "row"]


def test_a_folder_with_links_to_itself(tmp_path, settings):
    folder = tmp_path / "f"
    write_documents(folder, ["one", "two"])
    for name in ("b", "c"):
        write_documents(folder / name, [f"{name} one"])
    for link, to in (("loop", "."), ("b/up", ".."), ("b/side", "../c"), ("c/side", "../b"),
                     ("a", "c"), ("file", "0000.txt")):
        (folder / link).symlink_to(to)
    # c is read as a, the first of its names, and b from within it.
    assert documents(settings, folder) == ["one", "two", "c one", "b one", "one"]
    tokens.open_tokens(changed(settings, path=str(folder)))


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, settings):
    (tmp_path / "f").mkdir()
    os.mkfifo(tmp_path / "f" / "pipe")
    for path in (tmp_path / "f", tmp_path / "f" / "pipe"):
        with pytest.raises(UserError, match=r"^data\.path = .*pipe is no regular file"):
            documents(settings, path)


def test_folders_deeper_than_functions_may_call_each_other(tmp_path, settings):
    (tmp_path / "/".join(["d"] * 400)).mkdir(parents=True)
    (tmp_path / "/".join([*["d"] * 400, "a.txt"])).write_text("deep")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        assert documents(settings, tmp_path / "d") == ["deep"]
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
@pytest.mark.parametrize(("data", "text"), [
    (b"\xef\xbb\xbf", None), (b"\xef\xbb\xbfa", "a"), ("é日\U0001f600é\r\n".encode(), None),
    ("a\ufeffb".encode(), None), (b" \n" * 5 + b"x", None), (b"x" + b" \n" * 5, None),
    (b"a\rb\r\nc\n\x85\xff", "is not UTF-8 at byte 7"), (b"\xef\xbb\xbf\xff", "at byte 3"),
    (b"abc\xe6\x97", "is not UTF-8 at byte 3"), (b"abcd\xe6\x97a", "is not UTF-8 at byte 4"),
    (b"abc\0", "holds a NUL byte at offset 3"),
])
def test_text_in_blocks_of_any_size(tmp_path, settings, monkeypatch, block, data, text):
    monkeypatch.setattr(reading, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes(data)
    if text and " " in text:
        with pytest.raises(UserError, match=text):
            documents(settings, tmp_path / "a.txt")
        with pytest.raises(UserError, match=text):
            reading.read_file(tmp_path / "a.txt", "text")
        return
    wanted = data.decode("utf-8-sig")
    assert documents(settings, tmp_path / "a.txt") == ([wanted] if wanted else [])
    assert reading.read_file(tmp_path / "a.txt", "text") == wanted


def test_side_files_are_read_as_training_reads(tmp_path):
    data = b"\xef\xbb\xbfone\r\ntwo\n"
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data))
    for name in ("a.txt", "a.txt.gz"):
        assert reading.read_file(tmp_path / name, "text") == "one\r\ntwo\n"
    with pytest.raises(UserError, match=r"^text = '.*none': must be a text file$"):
        reading.read_file(tmp_path / "none", "text")


def test_jsonl_is_one_document_a_line(tmp_path, settings):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\\nb", "x": 1}\n\n{"text": ""}\n{"text": "\\ud800c"}\n')
    assert documents(settings, file) == ["a\nb", "�c"]
    file.write_text('{"body": "a"}\n')
    assert documents(settings, file, text_field="body") == ["a"]


def test_fingerprint_is_of_texts_and_their_borders(tmp_path, settings):
    def read(path):
        source = sources.open_source(changed(settings, path=str(path)))
        with contextlib.closing(read_ahead.TextAhead(source, tmp_path)) as text:
            assert text.whole
            return text

    def fingerprint(*texts):
        folder = tmp_path / hashlib.sha256(repr(texts).encode()).hexdigest()
        return read(write_documents(folder, texts)).fingerprint

    seen = [fingerprint(*texts) for texts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", "c"))]
    assert len(set(seen)) == 4
    (tmp_path / "same.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    same = read(tmp_path / "same.jsonl")
    assert same.fingerprint == seen[0]
    np.testing.assert_array_equal(same.sizes, [1, 1])
    assert same.amount == "2 documents, 0.0 MB"


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.txt", b"", ["holds no text"]),
    ("a.txt", b" \n\t", ["holds no text"]),
    ("a.txt", b"ab\0c", ["a.txt", "NUL byte at offset 2", "UTF-8"]),
    ("a.txt", b"ab\xff", ["a.txt", "not UTF-8 at byte 2"]),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ["line 3 of", "not JSON"]),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "a", "id": 1}\n',
     ["data.text_field = 'text'", "line 2 of", "'txt', 'id'"]),
    ("a.jsonl", b'["text"]\n', ["line 1 of", "not a JSON object"]),
    ("a.jsonl", b'{"text": 3}\n', ["line 1 of", "int", "must be text"]),
    ("a.jsonl", b'{"text": "\xff"}\n', ["line 1 of", "not UTF-8 at byte 10"]),
    ("f/.hidden", b"x", ["holds no documents"]),
    ("f/a.txt", b"", ["holds no text"]),
])
def test_text_that_is_not_text(tmp_path, settings, name, content, words):
    file = tmp_path / "bad" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    path = str(file.parent if name.startswith("f/") else file)
    with pytest.raises(UserError) as caught:
        tokens.open_tokens(changed(settings, path=path))
    message = str(caught.value)
    assert "\n" not in message
    for word in [*words, "data."]:
        assert word in message


def test_a_path_that_is_not_there(settings):
    with pytest.raises(UserError, match=r"^data\.path = 'no/such': does not exist; name a text"):
        tokens.open_tokens(changed(settings, path="no/such"))


def test_a_file_that_cannot_be_read_is_the_machine_s_fault(tmp_path, monkeypatch, settings):
    def refused(self, mode):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", refused)
    with pytest.raises(MachineError, match=r"data\.path = .*a\.txt.*Permission denied"):
        documents(settings, tmp_path / "a.txt")
