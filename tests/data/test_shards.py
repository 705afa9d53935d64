"""Folders of token shards: used as they are, or refused."""

import ast
import dataclasses
import hashlib
import io
import json
import os

import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from texts import assert_same, changed, fuzzed, read_all, take

from engram_jax.data import packing, shards, tokens
from engram_jax.data.batches import train_batches
from engram_jax.errors import UserError


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


# Checked


def with_digest(folder, **values):
    """Change meta.json as somebody would who knows of its checksum."""
    meta = {**json.loads((folder / "meta.json").read_text()), **values}
    meta["sha256"] = packing.meta_digest(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def rewritten(path, change):
    """A shard with other ids, whole as a file."""
    np.save(path, change(np.load(path)))


def half_too_large(ids):
    return np.where(np.arange(ids.size) % 2 == 0, ids, np.uint16(60_000))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("change", [half_too_large, np.zeros_like, lambda ids: ids[::-1]])
def test_ids_that_have_changed_are_refused(ready, split, change):
    folder, config = ready
    rewritten(folder / f"{split}-00000.npy", change)
    with pytest.raises(UserError, match=rf"{split}-00000\.npy: its ids' sha256 is [0-9a-f]+, but"):
        tokens.open_tokens(config)


def test_ids_of_another_tokenizer_are_refused(ready):
    folder, config = ready
    rewritten(folder / "train-00000.npy", half_too_large)
    ids = np.load(folder / "train-00000.npy")
    with_digest(folder, train_sha256=[hashlib.sha256(ids).hexdigest()])
    with pytest.raises(UserError, match=r"train-00000\.npy: holds token id 60000, but the "
                                        r"tokenizer's are below 280; it is damaged"):
        tokens.open_tokens(config)


@pytest.mark.parametrize("damage", [
    lambda f: edit_meta(f, end_id=5), lambda f: edit_meta(f, train_bytes=1),
    lambda f: edit_meta(f, split="tail"), lambda f: edit_meta(f, sha256="0" * 64)])
def test_a_meta_that_has_changed_is_refused(ready, damage):
    folder, config = ready
    damage(folder)
    with pytest.raises(UserError, match=r"meta\.json: sha256 = .* they have been changed"):
        tokens.open_tokens(config)


@pytest.mark.parametrize(("values", "message"), [
    ({"train_shards": [], "train_sha256": ["0"]}, "train_shards = .* as many as train_sha256"),
    ({"train_shards": [0]}, "must be positive"), ({"train_shards": [-5]}, "must be positive"),
    ({"train_shards": [2**60]}, r"train-00000\.npy: holds uint16"),
    ({"vocab_size": 0}, "end_id = 0: must be below vocab_size"),
    ({"directory": "/"}, "directory = '/': is no field"),
    ({"revision": "x"}, "revision = 'x': is no field"), ({"more": 1}, "more: no such field"),
])
def test_a_meta_of_somebody_who_means_harm(ready, values, message):
    folder, config = ready
    with_digest(folder, **values)
    with pytest.raises(UserError, match=message):
        tokens.open_tokens(config)


def test_no_head_of_a_file_is_evaluated(settings, monkeypatch):
    """As NumPy does it, Python 3.11 fails now and then where several threads do it at once."""
    data = tokens.open_tokens(settings)
    monkeypatch.setattr(ast, "literal_eval", None)
    assert len(read_all(tokens.open_packed(data.directory).train)) == data.train_tokens


def test_a_shard_with_more_behind_it(ready):
    folder, config = ready
    with (folder / "train-00000.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"train-00000\.npy: .*is \d+ bytes long, but its ids end"):
        tokens.open_tokens(config)


def test_damage_after_the_start_is_seen_when_it_is_read(ready):
    folder, config = ready
    data = tokens.open_tokens(config)
    rewritten(folder / "train-00000.npy", half_too_large)
    with pytest.raises(UserError, match=r"train-00000\.npy: holds token id 60000"):
        next(train_batches(data, config))


def test_a_shard_is_read_whole_once(ready, monkeypatch, tmp_path):
    folder, config = ready
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(shards, "SETTLED_NS", 0)
    first = tokens.open_tokens(config)
    with monkeypatch.context() as patch:
        patch.setattr(shards.Shard, "_read_whole", None)
        assert tokens.open_tokens(config) == first
    rewritten(folder / "train-00000.npy", np.zeros_like)
    for _ in range(2):
        with pytest.raises(UserError, match="sha256"):
            tokens.open_tokens(config)


def test_a_machine_that_cannot_note_what_it_checked(ready, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(shards, "SETTLED_NS", 0)
    assert tokens.open_tokens(ready[1]).documents == 60


def test_few_shards_are_open_at_once(settings, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    monkeypatch.setattr(shards, "MOST_MAPPED", 3)
    data = tokens.open_tokens(settings)
    assert len(data.train_shards) > 40
    before = len(os.listdir("/proc/self/fd"))
    ids = read_all(data.train)
    for start in range(0, len(ids) - 130, 31):
        np.testing.assert_array_equal(data.train.read(start, start + 130), ids[start:start + 130])
    assert len(os.listdir("/proc/self/fd")) <= before + 6


def test_reading_looks_at_the_shards_it_needs():
    class Untouched:
        def __len__(self):
            return 10

    stream = shards.TokenStream([*[Untouched()] * 5000, np.arange(10), *[Untouched()] * 5000])
    np.testing.assert_array_equal(stream.read(50_002, 50_010), np.arange(2, 10))
    np.testing.assert_array_equal(stream.read(50_000, 50_000), [])
    np.testing.assert_array_equal(stream.read(100_010, 100_010), [])


def test_what_a_name_stands_for_is_on_the_disk_before_it(settings, monkeypatch):
    """Every file is flushed before it gets its name, and the folder's names after each."""
    happened = []
    flushed, moved = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append(
        os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))) or flushed(handle))
    monkeypatch.setattr(os, "replace", lambda source, target: happened.append(
        f"name {os.path.basename(target)}") or moved(source, target))
    data = tokens.open_tokens(settings)
    folder = os.path.basename(data.directory)
    names = ["train-00000.npy", "validation-00000.npy", "tokenizer.json", "meta.json"]
    wanted = [line for name in names for line in (name, f"name {name}", folder)]
    assert happened[-len(wanted):] == wanted


META = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@hypothesis_settings(fuzzed, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_by_name(ready, data):
    """Bytes of any file changed, cut off or added, or fields of the meta: never a crash, and never
    other tokens."""
    folder, config = ready
    wanted = getattr(test_any_damage_is_refused_by_name, "wanted", None)
    if wanted is None:
        wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
        test_any_damage_is_refused_by_name.wanted = wanted
    for name, content in wanted.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(wanted)))
    if data.draw(st.booleans()):
        fields = json.loads(wanted["meta.json"])
        field = data.draw(st.sampled_from(sorted(fields)))
        edit = with_digest if data.draw(st.booleans()) else edit_meta
        edit(folder, **{field: data.draw(META)})
    else:
        content = bytearray(wanted[name])
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            del content[at:]
        else:
            content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        (folder / name).write_bytes(content)
    message = "data.path = "
    try:
        opened = tokens.open_tokens(config)
        np.testing.assert_array_equal(
            read_all(opened.train), np.load(io.BytesIO(wanted["train-00000.npy"])))
        assert opened.tokenizer.get_vocab_size() == 280
    except UserError as error:
        message = str(error)
    assert message.startswith("data.path = ")
    assert "\n" not in message
