"""Text to batches: every source and error, the split, the cache, and the order of batches."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import types

import numpy as np
import pytest
from etils import epath
from tokenizers import AddedToken, Tokenizer, models

from engram_jax.config import DataConfig
from engram_jax.data import cache, packing, sources, tokenizer, tokens
from engram_jax.data.batches import train_batches, validation_batches
from engram_jax.errors import MachineError, UserError

WORDS = [a + b for a in ("ka", "lo", "mi", "su", "té") for b in ("ra", "no", "vi", "pe", "")]


def prose(seed: int, words: int) -> str:
    """Lines of made-up words."""
    chosen = random.Random(seed).choices(WORDS, k=words)
    return "\n".join(" ".join(chosen[i:i + 9]) for i in range(0, words, 9)) + "\n"


def write_documents(folder, texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.fixture
def settings(tmp_path):
    """Small settings; the text is 60 documents in a folder."""
    texts = [prose(seed, 40 + seed % 7) for seed in range(60)]
    return DataConfig(path=write_documents(tmp_path / "text", texts), tokenizer="bpe:280",
                      sequence_length=16, batch_size=4, validation_fraction=0.1,
                      cache_dir=str(tmp_path / "cache"))


def changed(config, **values):
    return dataclasses.replace(config, **values)


def documents(config, path, **values):
    return list(sources.open_source(changed(config, path=str(path), **values)).documents())


def read_all(stream):
    return stream.read(0, len(stream))


def decoded(data, stream):
    """The stream's text, end tokens as newlines of their own."""
    parts = np.split(ids := read_all(stream), np.flatnonzero(ids == data.end_id) + 1)
    return [data.tokenizer.decode(part.tolist()) for part in parts]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
            assert batch[name].dtype == other[name].dtype


# Sources


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


def test_jsonl_is_one_document_a_line(tmp_path, settings):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\\nb", "x": 1}\n\n{"text": ""}\n{"text": "\\ud800c"}\n')
    assert documents(settings, file) == ["a\nb", "�c"]
    file.write_text('{"body": "a"}\n')
    assert documents(settings, file, text_field="body") == ["a"]


def test_fingerprint_is_of_texts_and_their_borders(tmp_path, settings):
    def fingerprint(*texts):
        folder = tmp_path / hashlib.sha256(repr(texts).encode()).hexdigest()
        return sources.open_source(
            changed(settings, path=write_documents(folder, texts))).fingerprint

    seen = [fingerprint(*texts) for texts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", "c"))]
    assert len(set(seen)) == 4
    (tmp_path / "same.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    same = sources.open_source(changed(settings, path=str(tmp_path / "same.jsonl")))
    assert same.fingerprint == seen[0]
    np.testing.assert_array_equal(same.summary.sizes, [1, 1])


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
    def refused(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", refused)
    with pytest.raises(MachineError, match=r"data\.path = .*a\.txt.*Permission denied"):
        documents(settings, tmp_path / "a.txt")


# Hugging Face datasets


class Rows(list):
    """As much of datasets.Dataset as is used."""

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        return Rows({name: row[name] for name in names} for row in self)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the datasets library that notes what it is asked for."""
    module = types.ModuleType("datasets")
    module.calls = []

    def load_dataset(name, config, *, split):
        module.calls.append((name, config, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("Couldn't find it\non the hub")
        return Rows([{"text": "one", "id": 1}, {"text": " ", "id": 2}, {"text": "two", "id": 3}])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hugging_face_names(settings, library):
    for path in ("hf:a/b", "hf:a/b:test", "hf:a/b:en:test", "hf:a/b:train[:10%]"):
        assert documents(settings, path) == ["one", "two"]
    assert library.calls == [("a/b", None, "train"), ("a/b", None, "test"), ("a/b", "en", "test"),
                             ("a/b", None, "train[:10%]")]


@pytest.mark.parametrize(("path", "field", "message"), [
    ("hf:", "text", "must be hf:NAME"),
    ("hf:a:b:c:d", "text", "must be hf:NAME"),
    ("hf:nobody/nothing", "text", "FileNotFoundError: Couldn't find it$"),
    ("hf:a/b", "body", r"data\.text_field = 'body': .*it has 'text', 'id'$"),
    ("hf:a/b", "id", r"data\.text_field = 'id': row 0 of hf:a/b holds int"),
])
def test_hugging_face_errors(settings, library, path, field, message):
    with pytest.raises(UserError, match=message):
        documents(settings, path, text_field=field)


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


# Tokenizers


def test_a_trained_tokenizer_loses_nothing_and_is_always_the_same(settings):
    first = tokenizer.train_bpe([prose(0, 500)], 300)
    assert first.to_str() == tokenizer.train_bpe([prose(0, 500)], 300).to_str()
    assert first.get_vocab_size() == 300
    text = "  kara\t¡ñandú! \U0001f600\r\n\n  日本"
    assert first.decode(first.encode(text).ids) == text
    assert (tokenizer.find_end_id(first), tokenizer.find_pad_id(first)) == (0, 1)


@pytest.mark.parametrize("where", ["file", "folder", "hub"])
def test_anybody_s_tokenizer(tmp_path, settings, monkeypatch, where):
    own = tokenizer.train_bpe([prose(0, 500)], 270)
    own.enable_truncation(3)
    own.enable_padding(length=1000)
    (tmp_path / "tok").mkdir()
    own.save(str(tmp_path / "tok" / "tokenizer.json"))
    monkeypatch.setattr(tokenizer, "Tokenizer", types.SimpleNamespace(
        from_pretrained=lambda name: own if name == "some/name" else None,
        from_str=Tokenizer.from_str))
    name = {"file": str(tmp_path / "tok" / "tokenizer.json"), "folder": str(tmp_path / "tok"),
            "hub": "some/name"}[where]
    data = tokens.open_tokens(changed(settings, tokenizer=name))
    assert data.vocab_size == 270
    assert data.train_tokens > 1000  # neither truncated nor padded
    assert data.train_bytes > data.train_tokens


@pytest.mark.parametrize(("name", "message"), [
    ("bpe:many", "must be bpe:SIZE with a size of at least 258"),
    ("bpe:257", "at least 258"),
    ("./none.json", "No such file"),
    ("nobody/nothing", "no such repository$"),
])
def test_tokenizers_that_are_not(settings, monkeypatch, name, message):
    def from_pretrained(name):
        raise Exception("no such repository\nat all")

    monkeypatch.setattr(tokenizer, "Tokenizer", types.SimpleNamespace(
        from_pretrained=from_pretrained, from_str=Tokenizer.from_str))
    with pytest.raises(UserError, match=message) as caught:
        tokens.open_tokens(changed(settings, tokenizer=name))
    assert str(caught.value).startswith(f"data.tokenizer = {name!r}: must be bpe:SIZE")


def test_a_file_that_is_no_tokenizer(tmp_path, settings):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer = .*a\.json"):
        tokens.open_tokens(changed(settings, tokenizer=str(tmp_path / "a.json")))


@pytest.mark.parametrize(("special", "plain", "end", "pad"), [
    (["<s>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"], [], 1, 2),
    (["<|endoftext|>"], [], 0, 0),
    (["<|end|>", "<|endoftext|>"], [], 1, 1),
    (["<|begin_of_text|>", "<|end_of_text|>"], [], 1, 1),
    (["<pad>", "<eos>"], ["</s>"], 1, 0),
    (["[PAD]", "[CLS]", "[SEP]"], ["<|endoftext|>", "<pad>"], 2, 0),
    ([], ["a", "</s>"], 1, 1),
])
def test_end_and_pad_tokens(special, plain, end, pad):
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(special + plain)}))
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    assert tokenizer.find_end_id(made) == end
    assert tokenizer.find_pad_id(made) == pad


def test_a_tokenizer_without_an_end():
    made = Tokenizer(models.WordLevel({"a": 0}))
    with pytest.raises(UserError, match=r"data\.tokenizer: has no token to end a document"):
        tokenizer.find_end_id(made)


# Packing


def test_streams_hold_all_documents_each_once(settings):
    data = tokens.open_tokens(settings)
    texts = documents(settings, settings.path)
    train, validation = decoded(data, data.train), decoded(data, data.validation)
    assert train.pop() == validation.pop() == ""  # both end with an end token
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in train]  # in order
    assert not set(train) & set(validation)
    assert (data.documents, data.vocab_size, data.dtype) == (60, 280, "uint16")
    assert (data.end_id, data.pad_id) == (0, 1)
    assert data.train_tokens == len(data.train)
    assert data.validation_tokens == len(data.validation)


def test_bytes_are_those_of_the_text(settings):
    data = tokens.open_tokens(settings)
    for count, stream in ((data.train_bytes, data.train),
                          (data.validation_bytes, data.validation)):
        assert count == sum(len(text.encode()) for text in decoded(data, stream))
    assert data.validation_bytes_per_token == data.validation_bytes / len(data.validation)
    total = data.train_bytes + data.validation_bytes
    assert 0.09 < data.validation_bytes / total <= 0.1


def test_validation_does_not_depend_on_the_seed_or_the_batch(settings):
    first = tokens.open_tokens(settings)
    second = tokens.open_tokens(changed(settings, seed=5, batch_size=2, sequence_length=3))
    assert first.directory == second.directory
    other = tokens.open_tokens(changed(settings, validation_fraction=0.3))
    assert other.directory != first.directory
    assert 0.27 < other.validation_bytes / (other.train_bytes + other.validation_bytes) <= 0.3


@pytest.mark.parametrize("count", [1, 2, 39])
def test_few_documents_are_split_at_the_tail(tmp_path, settings, count):
    texts = [prose(seed, 3000 // count) for seed in range(count)]
    data = tokens.open_tokens(changed(settings, path=write_documents(tmp_path / "few", texts)))
    joined = "".join(decoded(data, data.train) + decoded(data, data.validation))
    assert joined == "".join(texts)
    assert decoded(data, data.validation)[0] in texts[-1] or count > 2
    total = data.train_bytes + data.validation_bytes
    assert total == len(joined.encode())
    assert 0.09 < data.validation_bytes / total < 0.11
    assert (read_all(data.train) == 0).sum() + (read_all(data.validation) == 0).sum() == count
    assert read_all(data.train)[-1] != 0 or count > 2  # cut inside of the last document


def test_a_cut_never_falls_inside_of_a_character():
    text = "é" * 10
    for offset in range(21):
        head, tail = packing._cut(text, offset)
        assert head + tail == text


def test_one_document_that_is_nearly_everything_stays_in_training():
    sizes = np.array([100_000] + [100] * 99)
    split = packing.choose_split(sizes, 0.05)
    assert split.cut is None
    assert 0 not in split.documents
    assert 4750 * 1.1 <= 100 * len(split.documents) + 1000 <= 6500
    assert packing.choose_split(np.array([10**6] + [1] * 99), 0.05).cut == (0, 949_995 + 99)


def test_special_tokens_that_a_text_spells_out_are_text(tmp_path, settings):
    text = prose(1, 200) + "<|end|>" + prose(2, 200)
    (tmp_path / "a.txt").write_text(text)
    data = tokens.open_tokens(changed(settings, path=str(tmp_path / "a.txt")))
    assert (read_all(data.train) == data.end_id).sum() == 0
    assert "".join(decoded(data, data.train) + decoded(data, data.validation)) == text


def test_long_documents_and_many_shards(tmp_path, settings, monkeypatch):
    whole = tokens.open_tokens(settings)
    monkeypatch.setattr(packing, "SHARD_TOKENS", 100)
    monkeypatch.setattr(packing, "ENCODED_AT_ONCE", 500)
    shards = tokens.open_tokens(changed(settings, cache_dir=str(tmp_path / "other")))
    assert len(shards.train_shards) > 10
    assert set(shards.train_shards[:-1]) == {100}
    np.testing.assert_array_equal(read_all(shards.train), read_all(whole.train))
    for start, stop in ((0, 0), (95, 105), (99, 301), (100, 200), (len(whole.train) - 1,) * 2):
        np.testing.assert_array_equal(shards.train.read(start, stop),
                                      read_all(whole.train)[start:stop])
    text = prose(0, 1000)
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 300)
    cut = list(tokenizer.pieces(text))
    assert "".join(cut) == text
    assert all(piece.endswith("\n") and len(piece) <= 300 for piece in cut)
    assert [len(piece) for piece in tokenizer.pieces("x" * 700)] == [300, 300, 100]


def test_large_vocabularies_get_wide_ids(tmp_path, settings):
    vocabulary = {"<unk>": 70_000, "</s>": 69_999, "kara": 65_536}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.save(str(tmp_path / "wide.json"))
    data = tokens.open_tokens(changed(settings, tokenizer=str(tmp_path / "wide.json")))
    assert (data.dtype, data.vocab_size) == ("uint32", 70_001)
    assert set(read_all(data.train)) == {70_000, 69_999}


# The cache


def test_the_second_time_nothing_is_done_again(settings, monkeypatch):
    lines = []
    first = tokens.open_tokens(settings, lines.append)
    assert [line.split()[0] for line in lines] == ["training", "tokenizing", "packed"]
    monkeypatch.setattr(packing, "pack", None)
    monkeypatch.setattr(tokenizer, "train_bpe", None)
    assert tokens.open_tokens(settings, lines.append) == first
    assert len(lines) == 3


def test_another_text_is_another_place(tmp_path, settings):
    first = tokens.open_tokens(settings)
    (tmp_path / "text" / "0007.txt").write_text("kara kara kara")
    second = tokens.open_tokens(settings)
    assert second.fingerprint != first.fingerprint
    assert second.directory != first.directory
    assert "kara kara kara" in decoded(second, second.train) + decoded(second, second.validation)


@pytest.mark.parametrize("damage", ["meta.json", "train-00000.npy", "tokenizer.json", "cut",
                                    "half a tokenizer"])
def test_a_pack_that_was_cut_short_is_made_again(settings, damage):
    first = tokens.open_tokens(settings)
    wanted, folder = read_all(first.train), epath.Path(first.directory)
    if damage == "cut":
        data = (folder / "train-00000.npy").read_bytes()
        (folder / "train-00000.npy").write_bytes(data[:-10])
    elif damage == "half a tokenizer":
        next((folder.parent.parent / "tokenizers").iterdir()).write_text("{")
    else:
        (folder / damage).unlink()
    again = tokens.open_tokens(settings)
    assert again == first
    np.testing.assert_array_equal(read_all(again.train), wanted)
    assert not list(epath.Path(settings.cache_dir).glob(".making-*"))


def test_an_interrupted_packing_leaves_nothing_that_looks_whole(settings, monkeypatch):
    def interrupted(folder, target, names):
        publish(folder, target, names[:-1])
        raise KeyboardInterrupt

    publish = tokens.publish
    monkeypatch.setattr(tokens, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens.open_tokens(settings)
    monkeypatch.undo()
    left = epath.Path(settings.cache_dir) / "tokens"
    assert not list(left.glob("*/meta.json"))
    assert list(left.glob("*/train-*.npy"))
    assert len(tokens.open_tokens(settings).train) > 0


def test_what_is_mapped_stays_as_it_was(settings, tmp_path):
    data = tokens.open_tokens(settings)
    wanted = read_all(data.train)
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "new" / "train-00000.npy", np.zeros(len(wanted), np.uint16))
    cache.publish(tmp_path / "new", epath.Path(data.directory), ["train-00000.npy"])
    np.testing.assert_array_equal(read_all(data.train), wanted)
    assert not read_all(tokens.open_packed(data.directory).train).any()


def test_processes_that_pack_at_once_agree(settings):
    code = ("import sys; from engram_jax.config import *; from engram_jax.data.tokens import *; "
            "d = open_tokens(from_dict(json.loads(sys.argv[1]), DataConfig)); "
            "print(d.directory, hash(d.train.read(0, len(d.train)).tobytes()))")
    environment = {**os.environ, "PYTHONHASHSEED": "0",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", code,
               json.dumps(dataclasses.asdict(settings))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
               for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in running}
    assert len(answers) == 1
    assert answers.pop().split()[0] == tokens.open_tokens(settings).directory


def test_where_the_cache_is(settings, monkeypatch, tmp_path):
    assert cache.cache_folder(settings) == epath.Path(settings.cache_dir)
    unnamed = changed(settings, cache_dir="")
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "env"))
    assert cache.cache_folder(unnamed) == tmp_path / "env"
    monkeypatch.delenv("ENGRAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder(unnamed) == tmp_path / "xdg" / "engram_jax"


def test_a_cache_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"data\.cache_dir = .*file.*could not be written"):
        tokens.open_tokens(changed(settings, cache_dir=str(tmp_path / "file" / "cache")))


# Ready token shards


@pytest.fixture
def ready(tmp_path, settings):
    """A packed folder of its own, and settings that name it and a tokenizer that is not there."""
    folder = epath.Path(tokens.open_tokens(settings).directory).rename(tmp_path / "ready")
    return folder, changed(settings, path=str(folder), tokenizer="no/such",
                           cache_dir=str(tmp_path / "unused"))


def test_ready_shards_are_used_as_they_are(ready, settings, tmp_path):
    folder, config = ready
    data, packed = tokens.open_tokens(config), tokens.open_tokens(settings)
    assert data == dataclasses.replace(packed, directory=str(folder))
    assert data.tokenizer.to_str() == packed.tokenizer.to_str()
    assert_same(take(train_batches(data, config), 3), take(train_batches(packed, settings), 3))
    assert not (tmp_path / "unused").exists()


def edit_meta(folder, **values):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **values}))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "meta.json").unlink(), r"meta\.json or tokenizer\.json is missing"),
    (lambda f: (f / "tokenizer.json").unlink(), r"meta\.json or tokenizer\.json is missing"),
    (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json: must be an object"),
    (lambda f: (f / "meta.json").write_text("{}"), r"meta\.json: fingerprint: is missing"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json: its sha256 is"),
    (lambda f: (f / "validation-00000.npy").unlink(), r"validation-00000\.npy: is missing"),
    (lambda f: (f / "train-00000.npy").write_bytes((f / "train-00000.npy").read_bytes()[:-2]),
     r"train-00000\.npy: is missing, truncated"),
    (lambda f: np.save(f / "train-00000.npy", np.zeros(3, np.int64)),
     r"train-00000\.npy: holds int64 \(3,\), but meta\.json says uint16"),
    (lambda f: edit_meta(f, dtype="float32"), "must be uint16 or uint32"),
    (lambda f: edit_meta(f, vocab_size="280"), "vocab_size"),
    (lambda f: edit_meta(f, end_id=280), "end_id = 280: must be below vocab_size = 280"),
])
def test_ready_shards_that_are_not_whole(ready, damage, message):
    folder, config = ready
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        tokens.open_tokens(config)
    assert str(caught.value).startswith(f"data.path = {str(folder)!r}: not a whole folder")
    assert "\n" not in str(caught.value)


# Batches


def windows_of(batches):
    """Each sequence's T + 1 tokens as a tuple."""
    return [(*row, target[-1]) for batch in batches
            for row, target in zip(batch["tokens_BT"].tolist(), batch["targets_BT"].tolist(),
                                   strict=True)]


def test_an_epoch_predicts_each_token_once(settings):
    data = tokens.open_tokens(settings)
    ids, length = read_all(data.train), settings.sequence_length
    count = (len(ids) - 1) // length
    batches = take(train_batches(data, settings), -(-2 * count // settings.batch_size))
    seen = windows_of(batches)
    wanted = sorted(tuple(ids[i * length:(i + 1) * length + 1].tolist()) for i in range(count))
    assert sorted(seen[:count]) == wanted
    assert sorted(seen[count:2 * count]) == wanted
    assert seen[:count] != seen[count:2 * count]  # in a new order
    assert seen[:count] != wanted


def test_targets_follow_and_starts_follow_end_tokens(settings):
    data = tokens.open_tokens(settings)
    ids = read_all(data.train)
    starts = np.concatenate([[True], ids[:-1] == data.end_id])
    length = settings.sequence_length
    known = {tuple(ids[i:i + length + 1].tolist()): starts[i:i + length]
             for i in range(0, len(ids) - length, length)}
    count = (len(ids) - 1) // length // settings.batch_size
    firsts = 0
    for batch in take(train_batches(data, settings), count):
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "tokens_BT": ((4, 16), np.int32), "targets_BT": ((4, 16), np.int32),
            "starts_BT": ((4, 16), np.bool_)}
        np.testing.assert_array_equal(batch["tokens_BT"][:, 1:], batch["targets_BT"][:, :-1])
        for window, starts_T in zip(windows_of([batch]), batch["starts_BT"], strict=True):
            np.testing.assert_array_equal(starts_T, known[window])
            firsts += int(starts_T[0])
    assert firsts > 1  # a start at the edge of a window is seen across it


def test_the_seed_alone_makes_the_order(settings):
    data = tokens.open_tokens(settings)
    per_epoch = (data.train_tokens - 1) // settings.sequence_length
    count = 2 * per_epoch // settings.batch_size + 1
    first = take(train_batches(data, settings), count)
    assert_same(first, take(train_batches(data, settings), count))
    for seed in (1, 2):
        other = windows_of(take(train_batches(data, changed(settings, seed=seed)), count))
        assert other[:per_epoch] != windows_of(first)[:per_epoch]
        # nor is it the next epoch of another seed
        assert other[:per_epoch] != windows_of(first)[per_epoch:2 * per_epoch]


@pytest.mark.parametrize("done", [0, 3, 70])
def test_an_iterator_continues_where_it_was(settings, done):
    data = tokens.open_tokens(settings)
    per_epoch = (data.train_tokens - 1) // settings.sequence_length // settings.batch_size
    assert 3 < per_epoch < 70  # in the first epoch, and after an epoch's end
    iterator = train_batches(data, settings)
    take(iterator, done)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = take(iterator, per_epoch + 2)
    fresh = train_batches(data, settings)
    fresh.set_state(state)
    assert_same(take(fresh, per_epoch + 2), wanted)
    take(iterator, 2)
    iterator.set_state(state)
    assert_same(take(iterator, 2), wanted[:2])


def test_orbax_saves_and_loads_the_iterator(settings, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint.experimental.v1")
    data = tokens.open_tokens(settings)
    iterator = train_batches(data, settings)
    take(iterator, 5)
    response = ocp.save_checkpointables_async(tmp_path / "checkpoint", {"data": iterator})
    wanted = take(iterator, 4)  # while it is being saved
    response.result()
    fresh = train_batches(data, settings)
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": fresh})
    assert_same(take(fresh, 4), wanted)


def test_processes_share_the_same_batches(settings):
    data = tokens.open_tokens(settings)
    whole = take(train_batches(data, settings), 60)
    for count in (2, 4):
        parts = [take(train_batches(data, settings, process_index=index, process_count=count), 60)
                 for index in range(count)]
        assert_same([{name: np.concatenate([part[name] for part in step]) for name in step[0]}
                     for step in zip(*parts, strict=True)], whole)
    whole = list(validation_batches(data, settings))
    parts = [list(validation_batches(data, settings, process_index=index, process_count=2))
             for index in range(2)]
    assert_same([{name: np.concatenate([part[name] for part in step]) for name in step[0]}
                 for step in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("length", [1, 7, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_validation_predicts_each_token_once_in_order(settings, length, batch_size):
    config = changed(settings, sequence_length=length, batch_size=batch_size)
    data = tokens.open_tokens(config)
    ids = read_all(data.validation)
    batches = list(validation_batches(data, config))
    assert all(batch["tokens_BT"].shape == (batch_size, length) for batch in batches)
    joined = {name: np.concatenate([batch[name].ravel() for batch in batches])
              for name in batches[0]}
    real = joined["weights_BT"] == 1
    assert joined["weights_BT"].dtype == np.float32
    assert set(joined["weights_BT"]) <= {0, 1}
    np.testing.assert_array_equal(joined["targets_BT"][real], ids[1:])
    np.testing.assert_array_equal(joined["tokens_BT"][real], ids[:-1])
    np.testing.assert_array_equal(joined["starts_BT"][real],
                                  np.concatenate([[True], ids[:-2] == data.end_id]))
    assert (joined["targets_BT"][~real] == data.pad_id).all()
    for batch in batches:
        unused = batch["weights_BT"].sum(axis=1) == 0
        assert (batch["tokens_BT"][unused] == data.pad_id).all()
        assert not batch["starts_BT"][unused].any()
    assert_same(batches, list(validation_batches(data, changed(config, seed=9))))
    assert_same(batches[:2], list(validation_batches(data, config, limit=2)))


@pytest.mark.parametrize(("values", "count", "message"), [
    ({"sequence_length": 10_000}, 1,
     r"^data\.sequence_length = 10000: is too long for \d{4} tokens of training text"),
    ({"batch_size": 1000}, 1, r"^data\.batch_size = 1000: is more than the \d+ sequences of "
                              r"data\.sequence_length = 16 in \d{4} tokens"),
    ({"batch_size": 3}, 2, r"^data\.batch_size = 3: does not divide among 2 processes"),
])
def test_batches_that_cannot_be(settings, values, count, message):
    config = changed(settings, **values)
    data = tokens.open_tokens(config)
    with pytest.raises(UserError, match=message):
        train_batches(data, config, process_count=count)


def test_a_text_too_small_to_validate_on(tmp_path, settings):
    (tmp_path / "a.txt").write_text("x")
    config = changed(settings, path=str(tmp_path / "a.txt"))
    data = tokens.open_tokens(config)
    with pytest.raises(UserError, match=r"^data\.sequence_length = 16: is too long for 1 token"):
        train_batches(data, config)
    with pytest.raises(UserError, match=r"^data\.validation_fraction = 0\.1: leaves 0 tokens of 1"):
        validation_batches(data, config)
