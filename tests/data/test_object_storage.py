"""Text and token shards in object storage, with a store in memory that is reached over HTTP."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from etils import epath
from texts import changed, documents, prose, read_all

from engram_jax.data import remembered, sources, tokens
from engram_jax.errors import MachineError, UserError

TEXTS = [prose(seed, 30) for seed in range(50)]
LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()


@pytest.fixture
def bucket(store, request):
    yield epath.Path("gs://" + request.node.name.replace("_", "-").split("[")[0][:60])
    store.refuse = lambda method, name: False


def test_records_of_every_kind(settings, bucket):
    (bucket / "text" / "a.jsonl").write_bytes(LINES)
    (bucket / "text" / "b" / "c.json.gz").write_bytes(gzip.compress(LINES))
    (bucket / "text" / "d.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    assert documents(settings, bucket / "text") == [*TEXTS, *TEXTS, "one\r\n"]
    assert documents(settings, bucket / "text" / "b" / "c.json.gz") == TEXTS


def test_a_store_that_fails_and_comes_back(settings, store, bucket, monkeypatch):
    (bucket / "a.jsonl").write_bytes(LINES)
    config = changed(settings, path=str(bucket / "a.jsonl"))
    store.refuse = lambda method, name: name.endswith("a.jsonl")
    with pytest.raises(MachineError, match=r"data\.path = 'gs://.*a\.jsonl'"):
        tokens.open_tokens(config)
    store.refuse = lambda method, name: False
    assert tokens.open_tokens(config).documents == 50


def test_a_text_that_has_not_changed_is_not_read(settings, bucket, monkeypatch):
    (bucket / "a.jsonl").write_bytes(LINES)
    config = changed(settings, path=str(bucket / "a.jsonl"))
    first = tokens.open_tokens(config)
    with monkeypatch.context() as patch:
        patch.setattr(sources.Source, "parts", None)
        assert tokens.open_tokens(config) == first
    (bucket / "a.jsonl").write_bytes(LINES.replace(b"kara", b"kola"))
    assert tokens.open_tokens(config).fingerprint != first.fingerprint


def test_a_store_that_knows_no_versions_is_read_at_every_start(settings, bucket, monkeypatch):
    (bucket / "a.jsonl").write_bytes(LINES)
    monkeypatch.setattr(sources, "VERSIONS", ())
    config = changed(settings, path=str(bucket / "a.jsonl"))
    first = tokens.open_tokens(config)
    assert remembered.stamp(sources.open_source(config)) is None
    (bucket / "a.jsonl").write_bytes(LINES.replace(b"kara", b"kola"))
    assert tokens.open_tokens(config).fingerprint != first.fingerprint


def test_shards_are_checked_when_they_are_copied(settings, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "own"))
    far = changed(settings, cache_dir=str(bucket / "cache"))
    data, near = tokens.open_tokens(far), tokens.open_tokens(settings)
    assert data.sha256 == near.sha256
    shard = epath.Path(data.directory) / "train-00000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + b"\xff\xff")
    with pytest.raises(UserError, match=r"train-00000\.npy: its ids' sha256 is"):
        read_all(tokens.open_tokens(far).train)
    shard.write_bytes(whole)  # the damaged copy is not kept
    np.testing.assert_array_equal(read_all(tokens.open_tokens(far).train), read_all(near.train))
    copy, = (tmp_path / "own" / "downloads").rglob("train-00000.npy")
    copy.write_bytes(whole[:-2] + b"\xff\xff")
    again = dataclasses.replace(data)
    with pytest.raises(UserError, match="sha256"):
        read_all(again.train)
    np.testing.assert_array_equal(read_all(tokens.open_tokens(far).train), read_all(near.train))
