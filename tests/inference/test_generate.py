"""`engram-jax generate`, tables on the device, on the host or on disk: one text, or one line."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import micro
import numpy as np
import pytest

from engram_jax.cli import main
from engram_jax.config import ROW_DTYPES
from engram_jax.errors import MachineError, UserError
from engram_jax.inference import Request, generate, serving
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableWriter, verify
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.train import train

pytestmark = pytest.mark.usefixtures("compilations")
PROMPT = "kalo misu tera"


@pytest.fixture(autouse=True)
def the_prompt_is_read_in_chunks(monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 4)


@pytest.fixture(name="run")
def a_copy_of_it(trained, tmp_path):
    """To be written into."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("tables"))
    return tmp_path / "run"


@pytest.fixture(name="said")
def what_generate_says(capsys):
    """(exit code, text, line on standard error) of `generate DIR ...`."""
    def said(directory, *words):
        capsys.readouterr()
        code = main.main(["generate", str(directory), "--prompt", PROMPT, "--tokens", "12",
                         *map(str, words)])
        return code, *capsys.readouterr()

    return said


@pytest.fixture(name="text")
def what_is_generated(said):
    def text(*words):
        code, out, error = said(*words)
        assert (code, error) == (0, "")
        return out

    return text


def table(run, dtype="float32"):
    return run / "tables" / f"layer_0.{dtype}.table"


def test_the_text_is_the_same_from_every_home(trained, text):
    for words in ([], ["--temperature", 1, "--seed", 5, "--top-k", 40, "--top-p", 0.9]):
        on_device = text(trained, *words)
        assert on_device.startswith(PROMPT)
        assert len(on_device) > len(PROMPT) + 12
        assert text(trained, "--memory", "host", *words) == on_device
        assert text(trained, "--memory", "disk", *words) == on_device


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_packed_rows_give_the_same_text_from_host_and_disk(dtype, trained, text):
    on_host = text(trained, "--memory", "host", "--dtype", dtype)
    assert text(trained, "--memory", "disk", "--dtype", dtype) == on_host
    assert verify(table(trained, dtype)).dtype == dtype


def test_the_table_is_written_once_for_each_checkpoint(run, text, tmp_path):
    """After further training the file on disk is of an older step."""
    last = run / "checkpoints" / str(micro.STEPS)
    shutil.move(last, tmp_path / "last")
    before = text(run, "--memory", "disk")
    assert before == text(run)
    assert verify(table(run)).step == micro.STEPS - 1
    found = table(run).stat()
    assert text(run, "--memory", "disk") == before
    assert (table(run).stat().st_ino, table(run).stat().st_mtime_ns) == (
        found.st_ino, found.st_mtime_ns)
    shutil.move(tmp_path / "last", last)
    assert text(run, "--memory", "disk") == text(run)
    assert verify(table(run)).step == micro.STEPS


@pytest.mark.parametrize("memory", ["host", "disk"])
def test_a_checkpoint_that_comes_meanwhile_is_not_mixed_in(
    memory, run, text, tmp_path, monkeypatch
):
    """Parameters and tables are of one step."""
    last = run / "checkpoints" / str(micro.STEPS)
    shutil.move(last, tmp_path / "last")
    before = text(run)

    def late(*words, homes=serving._homes):
        shutil.move(tmp_path / "last", last)
        return homes(*words)

    monkeypatch.setattr(serving, "_homes", late)
    assert text(run, "--memory", memory) == before
    assert memory == "host" or verify(table(run)).step == micro.STEPS - 1


def test_a_table_of_a_run_that_was_trained_anew_is_written_again(run, text):
    """To the same step, from another start."""
    text(run, "--memory", "disk")
    before = table(run).read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config["training"]["seed"] += 1
    (run / "config.json").write_text(json.dumps(config))
    train(RunDirectory(run).config(), run, lambda line: None)
    assert text(run, "--memory", "disk") == text(run)
    assert table(run).read_bytes() != before
    assert verify(table(run)).step == micro.STEPS


def test_no_table_stays_open_if_another_cannot_be_opened(run, text, said, monkeypatch):
    """Two sites: the file of the second is damaged."""
    text(run, "--memory", "disk")
    opened, real = [], serving._on_disk

    def on_disk(records, saved, site, dtype):
        if opened:
            raise MachineError("the second cannot be read")
        opened.append(real(records, saved, site, dtype))
        return opened[0]

    class Twice(serving.SavedTables):
        def __init__(self, *words):
            super().__init__(*words)
            self.sites *= 2

    monkeypatch.setattr(serving, "_on_disk", on_disk)
    monkeypatch.setattr(serving, "SavedTables", Twice)
    assert said(run, "--memory", "disk") == (1, "", "engram-jax: the second cannot be read\n")
    assert opened[0]._file.closed


def altered(data):
    data[6000] ^= 1
    return data


@pytest.mark.parametrize(("change", "code", "words"), [
    (altered, 1, ["rows 0..405 are altered", "checksum"]),
    (lambda data: data[:9000], 1, ["cut short"]), (lambda data: b"", 2, ["is not a table"])])
def test_a_table_that_is_not_whole_is_one_line_and_no_text(change, code, words, run, said, text):
    text(run, "--memory", "disk")
    table(run).write_bytes(change(bytearray(table(run).read_bytes())))
    found, out, error = said(run, "--memory", "disk")
    assert (found, out) == (code, "")
    assert len(error.splitlines()) == 1
    assert all(word in error for word in [*words, str(table(run))]), error


def test_a_table_of_another_hash_is_one_line(run, said, text):
    text(run, "--memory", "disk")
    home = DiskTable.open(table(run))
    rows = home.lookup(np.arange(home.rows))
    home.close()
    with TableWriter(table(run), dataclasses.replace(home.info, fingerprint="ab:cd")) as writer:
        writer.write(rows)
    code, out, error = said(run, "--memory", "disk")
    assert (code, out) == (2, "")
    assert len(error.splitlines()) == 1
    assert "export the table of the run that is served" in error


@pytest.mark.parametrize(("words", "line"), [
    (["--cache", 12], "cache = 12: is too small: the prompt's "),
    (["--cache", -1], "cache = -1: must not be negative"),
    (["--dtype", "fp8"], "dtype = 'fp8': is of tables on host or disk"),
    (["--top-k", -1], "top_k = -1: "), (["--top-k", 2**31], "top_k = 2147483648: "),
    (["--top-p", 0], "top_p = 0.0: "), (["--top-p", 2], "top_p = 2.0: "),
    (["--seed", -1], "seed = -1: "), (["--temperature", "inf"], "temperature = inf: ")])
def test_what_cannot_be_generated_is_one_line(words, line, trained, said):
    code, out, error = said(trained, *words)
    assert (code, out) == (2, "")
    assert line in error
    assert len(error.splitlines()) == 1


def test_the_cache_may_be_just_large_enough(trained, said, text):
    _, _, error = said(trained, "--cache", 1)
    needed = int(error.split()[-1])
    assert text(trained, "--cache", needed) == text(trained)
    assert said(trained, "--cache", needed - 1)[0] == 2


@pytest.mark.slow
def test_prompts_of_nearly_the_same_length_share_their_programs(trained, monkeypatch):
    """The sizes that programs are compiled for; and the text is that of an engine of just one."""
    monkeypatch.setattr(generate, "CHUNK", 256)
    model = serving.served(RunDirectory(trained))
    tokenizer, engine, texts, sizes = model.reader.tokenizer, serving.Served.engine, {}, set()

    def noted(served, **settings):
        sizes.add(tuple(settings.items()))
        return engine(served, **settings)

    monkeypatch.setattr(serving.Served, "engine", noted)
    for words in ("kalo misu", PROMPT, PROMPT + " kalo"):
        ids = tuple(tokenizer.encode(words, add_special_tokens=False).ids)
        texts[words, ids] = "".join(generate.generate(model, words, tokens=15))
    assert sizes == {(("slots", 1), ("length", 32), ("chunk", 16))}
    assert len({len(ids) for _, ids in texts}) == 3
    for (words, ids), text in texts.items():
        (tokens,) = engine(model, slots=1, length=len(ids) + 15, chunk=len(ids)).generate(
            [Request(prompt=ids, tokens=15)])
        tokens = tokens[:-1] if tokens[-1] == model.reader.end_id else tokens
        assert text == tokenizer.decode([*ids, *tokens])[len(words):]


def test_the_engine_of_the_readme_generates(trained):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from engram_jax.inference.*?)```", readme, flags=re.DOTALL)
    names = {}
    exec(compile(code.replace("runs/mine", str(trained)), "README.md", "exec"), names)
    (tokens,) = names["tokens"]
    assert 1 <= len(tokens) <= 20
    with serving.engine(trained, slots=1, length=64) as engine:
        assert engine.generate([Request(prompt=(5, 6, 7), tokens=20)]) == [tokens]
    with pytest.raises(UserError, match="rows: their source has been closed"):
        names["engine"].generate([Request(prompt=(5, 6, 7), tokens=20)])


def test_tables_are_closed_if_there_is_no_engine(trained, monkeypatch):
    homes, real = [], serving._homes

    def noted(*words):
        made = real(*words)
        homes.extend(made.values())
        return made

    monkeypatch.setattr(serving, "_homes", noted)
    with pytest.raises(UserError, match="slots = 0: must be at least 1"):
        serving.engine(trained, memory="disk", slots=0)
    assert [home._file.closed for home in homes] == [True]
