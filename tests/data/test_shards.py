"""Folders of token shards: used as they are, or refused."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from texts import assert_same, changed, take

from engram_jax.data import tokens
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
