"""Text to token shards: the split, pieces, special tokens."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from texts import changed, decoded, documents, prose, read_all, write_documents
from tokenizers import Tokenizer, models

from engram_jax.data import (
    encoding,
    packing,
    read_ahead,
    reading,
    shards,
    sources,
    splitting,
    tokenizer,
    tokens,
)
from engram_jax.errors import MachineError


@contextlib.contextmanager
def ahead(folder, texts):
    """The texts, read ahead."""
    source = sources.Source("x", "data.path = 'x'", lambda: map(reading.Part, texts))
    with contextlib.closing(read_ahead.TextAhead(source, folder)) as text:
        yield text


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


def test_a_cut_never_falls_inside_of_a_character(tmp_path):
    with ahead(tmp_path, ["é" * 10]) as text:
        for offset in range(21):
            cut = text.after_line(0, 20, offset)
            assert "".join(text.blocks(0, cut)) + "".join(text.blocks(cut, 20)) == "é" * 10
    with ahead(tmp_path, ["ab", "c\nde\n"]) as text:
        assert [text.after_line(2, 7, offset) for offset in range(2, 8)] == [4, 4, 4, 5, 6, 7]


def test_one_document_that_is_nearly_everything_stays_in_training():
    sizes = np.array([100_000] + [100] * 99)
    split = splitting.choose_split(sizes, 0.05)
    assert split.cut is None
    assert 0 not in split.documents
    assert 4750 * 1.1 <= 100 * len(split.documents) + 1000 <= 6500
    assert splitting.choose_split(np.array([10**6] + [1] * 99), 0.05).cut == (0, 949_995 + 99)


def test_special_tokens_that_a_text_spells_out_are_text(tmp_path, settings):
    text = prose(1, 200) + "<|end|>" + prose(2, 200)
    (tmp_path / "a.txt").write_text(text)
    data = tokens.open_tokens(changed(settings, path=str(tmp_path / "a.txt")))
    assert (read_all(data.train) == data.end_id).sum() == 0
    assert "".join(decoded(data, data.train) + decoded(data, data.validation)) == text


def test_long_documents_and_many_shards(tmp_path, settings, monkeypatch):
    whole = tokens.open_tokens(settings)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    monkeypatch.setattr(packing, "ENCODED_AT_ONCE", 500)
    many = tokens.open_tokens(changed(settings, cache_dir=str(tmp_path / "other")))
    assert len(many.train_shards) > 10
    assert set(many.train_shards[:-1]) == {100}
    np.testing.assert_array_equal(read_all(many.train), read_all(whole.train))
    for start, stop in ((0, 0), (95, 105), (99, 301), (100, 200), (len(whole.train) - 1,) * 2):
        np.testing.assert_array_equal(many.train.read(start, stop),
                                      read_all(whole.train)[start:stop])


@pytest.mark.parametrize("block", [1, 7, 299, 300, 301, 10_000])
def test_pieces_do_not_depend_on_how_a_text_comes(monkeypatch, block):
    def pieces(text):
        return list(splitting.pieces(text[i:i + block] for i in range(0, len(text), block)))

    monkeypatch.setattr(splitting, "PIECE_CHARACTERS", 300)
    cut = pieces(text := prose(0, 1000))
    assert "".join(cut) == text
    assert all(piece.endswith("\n") and len(piece) <= 300 for piece in cut)
    assert [len(piece) for piece in pieces("x" * 700)] == [300, 300, 100]
    assert [len(piece) for piece in pieces("x" * 600)] == [300, 300]
    assert pieces("") == []


def test_large_vocabularies_get_wide_ids(tmp_path, settings):
    vocabulary = {"<unk>": 70_000, "</s>": 69_999, "kara": 65_536}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.save(str(tmp_path / "wide.json"))
    data = tokens.open_tokens(changed(settings, tokenizer=str(tmp_path / "wide.json")))
    assert (data.dtype, data.vocab_size) == ("uint32", 70_001)
    assert set(read_all(data.train)) == {70_000, 69_999}


# Large texts, and all cores


def shards_of(data):
    """The bytes of all shards."""
    return {shard.path.name: shard.path.read_bytes()
            for split in ("train", "validation") for shard in data.shards(split)}


@pytest.fixture
def large(monkeypatch):
    """A text of more than 700 bytes is large."""
    monkeypatch.setattr(read_ahead, "MOST_BYTES", 700)


def test_shards_are_the_same_whatever_the_number_of_processes(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "ENCODED_AT_ONCE", 500)
    here = tokens.open_tokens(settings)
    for processes in (1, 3):
        config = changed(settings, cache_dir=str(tmp_path / f"by {processes}"))
        there = tokens.open_tokens(config, processes=processes)
        assert shards_of(there) == shards_of(here)
        assert there.sha256 == here.sha256


def test_few_texts_are_held_at_once(settings):
    taken = []

    def jobs():
        for number in range(50):
            taken.append(number)
            yield [prose(number, 20)]

    trained = tokenizer.train_bpe([prose(0, 300)], 280)
    wanted = [trained.encode(prose(number, 20)).ids for number in range(50)]
    for done, (_, ids) in enumerate(encoding.encoded(jobs(), lambda job: job, trained, 2)):
        assert ids[0].tolist() == wanted[done]
        assert len(taken) - done <= 1 + encoding.AHEAD * 2
    assert done == 49


@pytest.mark.parametrize("program", ["import sys; sys.exit(3)", "import sys; sys.stdin.readline()"])
def test_a_process_that_is_killed(settings, tmp_path, monkeypatch, program):
    (tmp_path / "worker.py").write_text(program)
    monkeypatch.setattr(encoding.encoding_worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(MachineError, match=r"^a process that tokenizes has ended \(exit code"):
        tokens.open_tokens(settings, processes=2)
    monkeypatch.undo()
    assert tokens.open_tokens(settings, processes=2).documents == 60


@pytest.mark.parametrize("whole", [True, False])
def test_a_text_is_read_once(settings, monkeypatch, request, whole):
    if not whole:
        request.getfixturevalue("large")
    opened, reads = sources.open_source, []

    def counted(config):
        source = opened(config)
        return dataclasses.replace(source, read=lambda: reads.append(1) or source.read())

    monkeypatch.setattr(tokens, "open_source", counted)
    data = tokens.open_tokens(settings)
    assert reads == [1]
    assert data.split == ("documents" if whole else "pieces")


def test_a_large_text_loses_nothing(settings, large):
    data = tokens.open_tokens(changed(settings, validation_fraction=0.3))
    texts = documents(settings, settings.path)
    train, validation = decoded(data, data.train), decoded(data, data.validation)
    assert train.pop() == validation.pop() == ""
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in train]
    assert data.documents == 60
    assert 0.1 < data.validation_bytes / (data.train_bytes + data.validation_bytes) < 0.5


def test_a_large_text_of_one_document(settings, large, monkeypatch, tmp_path):
    monkeypatch.setattr(splitting, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(reading, "BLOCK", 64)
    (tmp_path / "a.txt").write_text(text := prose(0, 4000))
    data = tokens.open_tokens(changed(settings, path=str(tmp_path / "a.txt")))
    parts = [*decoded(data, data.train), *decoded(data, data.validation)]
    assert sorted("".join(parts)) == sorted(text)
    assert all(part in text for part in parts)  # an end token stands where the split has cut
    assert data.documents == 1
    assert data.train_bytes + data.validation_bytes == len(text.encode())
    assert 0.03 < data.validation_bytes / len(text.encode()) < 0.25


def test_a_large_text_is_known_by_what_it_holds(settings, large, tmp_path, monkeypatch):
    texts = documents(settings, settings.path)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "b.jsonl").write_text("\n".join(
        json.dumps({"text": text}) for text in [texts[0] + texts[1], *texts[2:]]))
    first = tokens.open_tokens(settings)
    same = tokens.open_tokens(changed(settings, path=str(tmp_path / "a.jsonl")))
    assert same.directory == first.directory
    assert tokens.open_tokens(
        changed(settings, path=str(tmp_path / "b.jsonl"))).fingerprint != first.fingerprint
    monkeypatch.setattr(read_ahead, "MOST_BYTES", 900)  # it ends inside of another document
    other = tokens.open_tokens(changed(settings, cache_dir=str(tmp_path / "other")))
    assert other.fingerprint == first.fingerprint


@pytest.mark.parametrize("more", [0, 1])
def test_a_text_of_just_that_size(settings, tmp_path, monkeypatch, more):
    (tmp_path / "a.txt").write_text(text := prose(0, 500))
    monkeypatch.setattr(read_ahead, "MOST_BYTES", len(text.encode()) + more)
    data = tokens.open_tokens(changed(settings, path=str(tmp_path / "a.txt")))
    assert data.split == ("tail" if more else "pieces")
    assert "".join([*decoded(data, data.train), *decoded(data, data.validation)]) == text


def test_documents_that_look_like_files(settings, tmp_path, monkeypatch):
    """A byte order mark and a NUL inside of a record are text, however it is read back."""
    texts = ["\ufeff" + prose(0, 50), "a\0b" + prose(1, 50)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    monkeypatch.setattr(read_ahead, "BLOCK", 7)
    with contextlib.closing(read_ahead.TextAhead(sources.open_source(
            changed(settings, path=str(tmp_path / "a.jsonl"))), tmp_path)) as text:
        assert ["".join(blocks) for blocks in text.documents()] == texts
        assert "".join(part.text for part in text.all_parts()) == "".join(texts)
        assert [part.ends for part in text.all_parts()].count(True) == 2


def test_one_reading_of_special_tokens_in_training_and_anywhere(settings, tmp_path):
    text = f"{prose(1, 100)}<|end|> {prose(2, 100)}<|pad|>"
    (tmp_path / "a.txt").write_text(text)
    data = tokens.open_tokens(changed(settings, path=str(tmp_path / "a.txt"),
                                      validation_fraction=0.001))
    ids = np.concatenate([read_all(data.train), read_all(data.validation)])
    assert data.tokenizer.encode(text[:len(text) // 2], add_special_tokens=False).ids
    packed = data.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert packed == text + "<|end|>"
    trained = tokenizer.train_bpe([text], 300)
    again = tokenizer.parse_tokenizer(trained.to_str())
    packed, = encoding.encoding_worker.encode(again, [text])
    for made in (trained, again):
        assert made.encode(text, add_special_tokens=False).ids == packed.tolist()
    (_, (elsewhere,)), = encoding.encoded([[text]], lambda job: job, trained, 1)
    assert elsewhere.tolist() == packed.tolist()
    assert 0 not in packed
