"""Files of records under every name and packing: the same documents, or one clear line."""

import gzip
import importlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import changed, documents, fuzzed, prose

from engram_jax.config import DataConfig
from engram_jax.data import reading, records, sources, tokens
from engram_jax.errors import UserError

TEXTS = [prose(seed, 30) for seed in range(50)]
ROWS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


def packed_by_zstandard(data):
    library = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as other programs write them
    return b"".join(library.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.NdJson", "x.json", "x.JSON"])
def test_json_lines_under_any_of_their_names(tmp_path, settings, name):
    (tmp_path / name).write_bytes(LINES)
    assert documents(settings, tmp_path / name) == TEXTS
    source = sources.open_source(changed(settings, path=str(tmp_path / name)))
    assert source.amount.startswith("50 documents")


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ", ".zst", ".zstd", ".unnamed"])
@pytest.mark.parametrize(("name", "data"), [
    ("x.jsonl", LINES), ("x.ndjson", LINES), ("x.json", LINES), ("x.json", ARRAY)])
def test_packed_records(tmp_path, settings, name, data, suffix):
    packed = {"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress}.get(
        suffix, packed_by_zstandard)(data)
    if suffix == ".unnamed":  # the name does not say so, the bytes do
        suffix, packed = "", gzip.compress(data)
    (tmp_path / (name + suffix)).write_bytes(packed)
    assert documents(settings, tmp_path / (name + suffix)) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_text(tmp_path, settings, suffix):
    data = b"\xef\xbb\xbfone\r\n" + "zwölf\n".encode() * 300_000
    packed = gzip.compress(data) if suffix == ".gz" else packed_by_zstandard(data)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    assert documents(settings, tmp_path / f"a.txt{suffix}") == [data[3:].decode()]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:40],
                                    lambda data: data[:60] + bytes(20) + data[80:]])
def test_a_packed_file_that_is_damaged(tmp_path, settings, suffix, damage):
    packed = gzip.compress(LINES) if suffix == ".gz" else packed_by_zstandard(LINES)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(damage(packed))
    with pytest.raises(UserError, match=r"^data\.path = .*a\.jsonl") as caught:
        documents(settings, tmp_path / f"a.jsonl{suffix}")
    assert "damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_of_zstandard(tmp_path, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd and so on")
    with pytest.raises(UserError, match=r"pip install 'engram_jax\[zstd\]'"):
        documents(settings, tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("array", [
    b'[{"text":"a]}\\"[{"},{"n":[{}],"text":"b"}]', b'\xef\xbb\xbf\n [ \n{"text": "a]}\\"[{"}\n'
    b',\n{"text": "b", "more": {"text": ["x", {}]}}\n]\n\n'])
@pytest.mark.parametrize("block", [1, 2, 7, 2**20])
def test_an_array_is_read_in_blocks(tmp_path, settings, monkeypatch, array, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    (tmp_path / "a.json").write_bytes(array)
    assert documents(settings, tmp_path / "a.json") == ['a]}"[{', "b"]


@pytest.mark.parametrize("content", [
    '{\n "name": "x",\n "text": "y"\n}\n', "[1, 2]", '["a"]', '"text"', "[]", "not json"])
def test_other_json_is_a_text(tmp_path, settings, content):
    (tmp_path / "package.json").write_text(content)
    assert documents(settings, tmp_path / "package.json") == [content]


DEEP = b'{"text":"ok","m":' + b"[" * 5000 + b"]" * 5000 + b"}"


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jsonl", DEEP, ["line 1 of", "nested deeper than 200 levels"]),
    ("a.json", DEEP, ["line 1 of", "nested deeper"]),
    ("a.json", b"[" + DEEP + b"]", ["record 1 of", "nested deeper"]),
    ("a.json", b'[{"text": "a"}, {"text": 3}]', ["record 2 of", "int", "must be text"]),
    ("a.json", b'[{"text": "a"}, {"txt": "b"}]', ["record 2 of", "'txt'"]),
    ("a.json", b'[{"text": "a"},, {"text": "b"}]', ["record 2 of", "not JSON"]),
    ("a.json", b'[{"text": "a"}, {"text": "b"', ["a.json", "ends inside of its array"]),
    ("a.json", b'[{"text": "a"}] [', ["a.json", "goes on behind its array"]),
    ("a.json", b'{"text": "a"}\n{"text": }', ["line 2 of", "not JSON"]),
    ("a.json", b'{"text": }\n', ["line 1 of", "not JSON"]),
    ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", ["line 1 of", "not JSON", "digits"]),
    ("a.jsonl", b"a\n" + gzip.compress(b"b", mtime=0), ["line 1 of", "not JSON"]),
])
def test_records_that_are_none(tmp_path, settings, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        tokens.open_tokens(changed(settings, path=str(tmp_path / name)))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_bracket_in_a_string_is_no_level(tmp_path, settings):
    text = "[" * 5000 + '"' + "{" * 5000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert documents(settings, tmp_path / "a.jsonl") == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_that_is_too_long_for_memory(tmp_path, settings, monkeypatch, name):
    monkeypatch.setattr(records, "LONGEST_RECORD", 100)
    monkeypatch.setattr(reading, "BLOCK", 50)
    rows = [{"text": "short"}, {"text": "x" * 200}]
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) if name == "a.jsonl"
                                 else json.dumps(rows))
    with pytest.raises(UserError, match=r"(line 2 of .* longer than 100 bytes|more than 100)"):
        documents(settings, tmp_path / name)


# Parquet


def test_parquet(tmp_path, settings):
    library = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    table = library.table({"n": list(range(50)), "text": TEXTS})
    parquet.write_table(table, tmp_path / "a.PARQUET", row_group_size=7)
    assert documents(settings, tmp_path / "a.PARQUET") == TEXTS
    with pytest.raises(UserError, match=r"data\.text_field = 'body': .*a\.PARQUET has no such "
                                        "column; it has 'n', 'text'$"):
        documents(settings, tmp_path / "a.PARQUET", text_field="body")
    with pytest.raises(UserError, match=r"row 0 of .*a\.PARQUET holds int"):
        documents(settings, tmp_path / "a.PARQUET", text_field="n")
    data = (tmp_path / "a.PARQUET").read_bytes()
    for damaged in (data[:-4], data[:100], data[:200] + bytes(1000) + data[1200:], b""):
        (tmp_path / "b.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"b\.parquet is a damaged Parquet file") as caught:
            documents(settings, tmp_path / "b.parquet")
        assert "\n" not in str(caught.value)


def test_without_the_library_of_parquet(tmp_path, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'engram_jax\[parquet\]'"):
        documents(settings, tmp_path / "a.parquet")


# Any bytes at all

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
RECORD = st.dictionaries(st.sampled_from(["text", "n", "é"]), JSON)
AROUND = st.lists(st.binary(max_size=20) | st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"\r\n", b"\xef\xbb\xbf", b'{"text": "a"}',
     b"\x1f\x8b\x08", b"\x00", b"\xff\xfe", b",", b'{"text":']), max_size=12).map(b"".join)


@fuzzed
@given(content=AROUND | st.lists(RECORD).map(lambda rows: "\n".join(
    map(json.dumps, rows)).encode()) | st.lists(RECORD).map(lambda rows: json.dumps(rows).encode()),
       name=st.sampled_from(["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"]), data=st.data())
def test_any_bytes_are_documents_or_one_clear_line(tmp_path_factory, content, name, data):
    file = tmp_path_factory.getbasetemp() / name
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if content and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=3)) + content[at + 1:]
    file.write_bytes(content)
    message = "data."
    try:
        for text in sources.open_source(DataConfig(path=str(file))).documents():
            assert text.strip()
            text.encode()
    except UserError as error:
        message = str(error)
    assert message.startswith("data.")
    assert "\n" not in message


@fuzzed
@given(rows=st.lists(st.fixed_dictionaries({"text": st.text()}, optional={"n": JSON}), min_size=1),
       form=st.sampled_from(["lines", "array", "indented"]), block=st.integers(1, 50))
def test_records_come_back_as_they_were(tmp_path_factory, rows, form, block):
    file = tmp_path_factory.getbasetemp() / "b.json"
    file.write_text("\r\n".join(map(json.dumps, rows)) if form == "lines" else
                    json.dumps(rows, indent=1 if form == "indented" else None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        texts = list(sources.open_source(DataConfig(path=str(file))).documents())
    assert texts == [row["text"] for row in rows if row["text"].strip()]
