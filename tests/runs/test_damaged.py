"""A damaged checkpoint is told, kept aside, and gone back behind; `verify` reads all of a run."""

import gc
import json
import shutil
import time

import pytest
from etils import epath
from micro import curve, with_training

from engram_jax.cli.main import main
from engram_jax.errors import MachineError
from engram_jax.runs import digests, train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.export import export_tables

pytestmark = [
    pytest.mark.usefixtures("compilations"),
    # Readers that orbax leaves behind find their event loop closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def silent(line):
    del line


@pytest.fixture(scope="module")
def run(trained):
    return RunDirectory(trained).config()


@pytest.fixture(scope="module", autouse=True)
def left_behind():
    """Such readers are gone with this module: no other test is told of them."""
    yield
    time.sleep(0.2)
    gc.collect()


@pytest.fixture
def stopped(trained, tmp_path):
    """A run without its result, whose newest checkpoint is of its last step, 7; the other is 6."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)


def cut(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:100])
    return file


def flip(folder):
    """One bit: orbax would not notice."""
    file = largest(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def remove(folder):
    file = largest(folder)
    file.unlink()
    return file


def unmark(folder):
    (folder / "commit_success.txt").unlink()
    return folder / "commit_success.txt"


def spoil_digests(folder):
    (folder / digests.FILE).write_text("{")
    return folder / digests.FILE


def undigested(folder):
    """A checkpoint of an older version, cut off."""
    (folder / digests.FILE).unlink()
    file = folder / "state" / "_METADATA"
    file.write_bytes(file.read_bytes()[:100])
    return folder


DAMAGES = (cut, flip, remove, unmark, spoil_digests, undigested)


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_a_damaged_checkpoint_is_gone_back_behind(run, trained, stopped, spoil):
    file = spoil(stopped / "checkpoints" / "7")
    said = []
    train.train(run, stopped, said.append)
    if spoil is not unmark:
        [line] = [line for line in said if line.startswith("damaged: ")]
        assert str(file.name) in line
        assert str(file.parents[1] if spoil is cut else stopped) in line
    assert "micro: going on from step 6" in said
    assert (stopped / "damaged" / "7" / "state").is_dir()
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["6", "7"]
    assert curve(stopped) == curve(trained)
    assert RunDirectory(stopped).result()["loss"] == RunDirectory(trained).result()["loss"]


@pytest.mark.slow
def test_two_that_were_damaged_are_both_kept(run, stopped):
    for folder in ("7", "7"):
        flip(stopped / "checkpoints" / folder)
        train.train(run, stopped, silent)
        (stopped / "result.json").unlink()
    assert sorted(path.name for path in (stopped / "damaged").iterdir()) == ["7", "7-1"]


def test_the_only_checkpoint_is_not_moved(run, stopped):
    shutil.rmtree(stopped / "checkpoints" / "6")
    flip(stopped / "checkpoints" / "7")
    for _ in range(2):
        with pytest.raises(MachineError, match="no earlier checkpoint is left: put it back"):
            train.train(run, stopped, silent)
    assert (stopped / "checkpoints" / "7" / "state").is_dir()


def test_a_whole_checkpoint_that_cannot_be_read_is_not_damaged(run, stopped, monkeypatch):
    def refuses(self, *words, **named):
        raise MachineError("the disk is away")

    monkeypatch.setattr(Checkpoints, "restore", refuses)
    with pytest.raises(MachineError, match="the disk is away"):
        train.train(run, stopped, silent)
    assert not (stopped / "damaged").exists()


def test_digests_never_lead_out_of_the_folder(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "checkpoints" / "7", tmp_path / "7")
    path = tmp_path / "7" / digests.FILE
    values = json.loads(path.read_text())
    values["files"]["../../secret"] = [6, "0" * 64]
    path.write_text(json.dumps(values))
    opened, read = [], digests._digest
    monkeypatch.setattr(digests, "_digest", lambda file: opened.append(str(file)) or read(file))
    assert digests.damage(epath.Path(tmp_path / "7")) == [
        f"{tmp_path / '7'}: ../../secret is missing"]
    assert opened
    assert not any("secret" in name for name in opened)


@pytest.mark.parametrize("files", [[], {"state/_METADATA": 5}, {"state/_METADATA": ["x", None]}])
def test_digests_of_another_kind_are_damage(trained, tmp_path, files):
    shutil.copytree(trained / "checkpoints" / "7", tmp_path / "7")
    (tmp_path / "7" / digests.FILE).write_text(json.dumps({"files": files}))
    assert digests.damage(epath.Path(tmp_path / "7"))


# --- engram-jax verify RUN ---


def verified(path, capsys):
    code = main(["verify", str(path)])
    return code, capsys.readouterr().out.splitlines()


def test_a_whole_run_is_whole(stopped, capsys):
    export_tables(stopped, "int8")
    code, lines = verified(stopped, capsys)
    assert code == 0, lines
    for name in ("config.json", "checkpoints/6", "checkpoints/7", "tables/layer_0.int8.table"):
        assert f"{stopped / name}: whole" in lines
    [tokens] = [line for line in lines if "/tokens/" in line]
    assert tokens.endswith(": whole")


@pytest.mark.parametrize("spoil", [spoil for spoil in DAMAGES if spoil is not undigested],
                         ids=lambda spoil: spoil.__name__)
def test_verify_names_a_damaged_file_of_a_checkpoint(stopped, capsys, spoil):
    file = spoil(stopped / "checkpoints" / "6")
    code, lines = verified(stopped, capsys)
    assert code == 1
    damaged = [line for line in lines if line.startswith("damaged: ")]
    assert file.name in damaged[0]
    assert f"{stopped / 'checkpoints' / '7'}: whole" in lines


@pytest.mark.parametrize("name", ["config.json", "env.json", "result.json", "metrics.jsonl",
                                  "tables", "tokens"])
def test_verify_names_what_else_is_damaged(stopped, trained, capsys, name, tmp_path):
    if name == "tables":
        [file] = export_tables(stopped, "fp8")
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif name == "tokens":
        env = json.loads((stopped / "env.json").read_text())
        file = tmp_path / "tokens" / "train-00000.npy"
        shutil.copytree(env["tokens"], file.parent)
        flip(file.parent)
        (stopped / "env.json").write_text(json.dumps({**env, "starts": [],
                                                      "tokens": str(file.parent)}))
    else:
        file = stopped / name
        file.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    code, lines = verified(stopped, capsys)
    assert code == 1, lines
    assert any(line.startswith("damaged: ") and file.name in line for line in lines), lines


def test_an_older_checkpoint_is_said_not_to_be_checked(stopped, capsys):
    (stopped / "checkpoints" / "7" / digests.FILE).unlink()
    code, lines = verified(stopped, capsys)
    assert code == 0
    assert f"{stopped / 'checkpoints' / '7'}: no digests were written with it" in lines


def test_digests_are_written_with_every_checkpoint(run, tmp_path):
    train.train(with_training(run, checkpoint_every=2, keep_checkpoints=9), tmp_path, silent)
    for step in (2, 4, 6, 7):
        folder = tmp_path / "checkpoints" / str(step)
        assert (folder / digests.FILE).exists()
        assert digests.damage(epath.Path(folder)) == []
