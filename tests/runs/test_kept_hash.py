"""A run keeps what it hashes with, so a changed tokenizer library locks nobody out of it."""

import json
import shutil

import jax
import micro
import numpy as np
import pytest
from tokenizers import normalizers

from engram_jax.errors import UserError
from engram_jax.hashing import compression
from engram_jax.insides.observing import open_run
from engram_jax.runs.checkpoints import last_checkpoint
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import open_inputs, open_reader, reader_of
from engram_jax.runs.train import train
from engram_jax.settings import changed


@pytest.fixture(name="records")
def a_copy_of_a_trained_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


@pytest.fixture(name="another_library")
def a_library_that_normalises_otherwise(monkeypatch):
    """As if the next version of `tokenizers` no longer lowercased, say."""
    monkeypatch.setattr(compression, "_normalizer", lambda: normalizers.Strip())


def test_a_run_opens_where_the_library_normalises_otherwise(records, another_library):
    derived = open_reader(records.config(), records.tokenizer())
    with pytest.raises(UserError, match="trained with another tokenizer or hash"):
        last_checkpoint(records, derived).saved_state()  # the trap, where no hash is kept
    opened = open_run(records)
    assert opened.reader.fingerprints()["layer_0"] != derived.fingerprints()["layer_0"]


def test_an_interrupted_run_goes_on_there_and_ends_the_same(
        trained, records, another_library, compilations):
    shutil.rmtree(records.path / "checkpoints" / str(micro.STEPS))
    before = (records.path / "hash.json").read_bytes()
    result = json.loads((records.path / "result.json").read_text())
    (records.path / "result.json").unlink()
    again = train(records.config(), records.path, lambda line: None)
    assert again["loss"] == result["loss"]
    assert (records.path / "hash.json").read_bytes() == before


def test_a_run_of_an_older_version_opens_where_its_digest_is_reproduced_and_then_keeps_it(
        trained, records, compilations):
    before = (records.path / "hash.json").read_bytes()
    (records.path / "hash.json").unlink()
    state = open_run(records).state
    for ours, theirs in zip(jax.tree.leaves(state.tables),
                            jax.tree.leaves(open_run(RunDirectory(trained)).state.tables),
                            strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (records.path / "result.json").unlink()
    train(records.config(), records.path, lambda line: None)
    assert (records.path / "hash.json").read_bytes() == before


def test_an_older_run_whose_digest_is_not_reproduced_is_refused_and_stays_as_it_was(
        records, another_library, compilations):
    (records.path / "hash.json").unlink()
    (records.path / "result.json").unlink()
    with pytest.raises(UserError, match="trained with another tokenizer or hash"):
        train(records.config(), records.path, lambda line: None)
    assert not (records.path / "hash.json").exists()


def test_a_hash_that_is_altered_or_of_another_run_is_one_line(records):
    path = records.path / "hash.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"hash.json: digest = .*: is not that of the contents"):
        reader_of(records)
    path.write_text(text)
    other = micro.with_model(records.config(), engram=None)
    with pytest.raises(UserError, match=r"hash.json: memory 'layer_0' = .*; the model has None"):
        open_inputs(other, artifact=records.artifact())


def test_a_run_without_memory_keeps_no_hash(records, compilations, tmp_path):
    run = micro.with_training(micro.with_model(records.config(), engram=None), steps=1)
    train(run, tmp_path / "bare", lambda line: None)
    assert not (tmp_path / "bare" / "hash.json").exists()


def test_a_run_that_begins_from_another_hashes_as_that_one_does(
        records, another_library, compilations, tmp_path):
    run = micro.with_training(records.config(), start_from=str(records.path), steps=micro.STEPS)
    train(run, tmp_path / "next", lambda line: None)
    kept = (tmp_path / "next" / "hash.json").read_bytes()
    assert kept == (records.path / "hash.json").read_bytes()


def test_a_tokenizer_much_smaller_than_the_vocabulary_is_said(records):
    def said(size):
        lines = []
        open_inputs(changed(records.config(), {"model.vocab_size": size}), lines.append)
        return "\n".join(lines)

    assert "tokens, model.vocab_size is 600: the rest" in said(600)
    assert "is never used" not in said(300)
