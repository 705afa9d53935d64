"""What has been made from a text is kept, checked and found again."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from texts import changed, decoded, read_all

from engram_jax.data import cache, packing, shards, tokenizer, tokens
from engram_jax.errors import MachineError, UserError


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
    with pytest.raises(UserError, match=r"train-00000\.npy: its ids' sha256 is"):
        tokens.open_packed(data.directory)


def test_processes_that_pack_at_once_agree(settings):
    code = ("import json, sys; from engram_jax.settings import from_dict; "
            "from engram_jax.config import *; from engram_jax.data.tokens import *; "
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


def test_a_killed_packing_s_folder_is_removed_by_the_next(settings, tmp_path):
    """Not those of packings that go on, nor one that has just begun."""
    code = ("import json, signal, sys; from engram_jax.settings import from_dict; "
            "from engram_jax.config import DataConfig; from engram_jax.data import packing, tokens;"
            "packing.encoded = lambda *args: print('now', flush=True) or signal.pause(); "
            "tokens.open_tokens(from_dict(json.loads(sys.argv[1]), DataConfig))")
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(settings))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
               for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == b"now\n"
    folders = list((tmp_path / "cache").glob(".making-*"))
    assert len(folders) == 2
    running[0].kill()
    running[0].communicate()
    for folder in folders:
        os.utime(folder, (0, 0))
    with cache.working_folder(settings):
        left = [folder for folder in folders if folder.exists()]
    assert len(left) == 1
    running[1].kill()
    running[1].communicate()
    with cache.working_folder(settings):
        assert not left[0].exists()


def test_a_disk_that_gets_full_while_packing(settings, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "add", full)
    with pytest.raises(MachineError, match=r"data\.cache_dir = .* written: .*No space"):
        tokens.open_tokens(settings)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").glob(".making-*"))
    assert tokens.open_tokens(settings).documents == 60
