"""`analyze`: every analysis of trained runs from the command line, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from micro import micro, plain, with_model, write_text

from engram_jax import recipes
from engram_jax.cli import main
from engram_jax.cli.results import ANALYSES as NAMES
from engram_jax.data.reading import read_file
from engram_jax.insides import analyses
from engram_jax.insides.examples import GATED
from engram_jax.insides.observing import Opened, open_run
from engram_jax.insides.texts import Text, sequences, validation_text
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import open_inputs
from engram_jax.runs.train import train
from engram_jax.settings import changed

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run with memory, one without, and one with another tokenizer."""
    place = tmp_path_factory.mktemp("analyses")
    words = Path(write_text(place / "text.txt")).read_text()
    (place / "text.txt").write_text(words.replace("te", "Te").replace("no", "No_me"))
    base = plain(micro(str(place / "text.txt"), name="memory"))
    other = micro(write_text(place / "other.txt", seed=1), name="other")
    runs = {"memory": base, "bare": with_model(base, engram=None),
            "other": with_model(plain(other), engram=None)}
    for name, run in runs.items():
        train(run.__class__(**{**vars(run), "name": name}), place / name, lambda line: None)
    return place


def found(capsys, *words):
    assert main.main(list(map(str, words))) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main.main(list(map(str, words))) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


@pytest.mark.parametrize("what", NAMES)
def test_every_analysis_of_a_run_is_json(folders, what, capsys):
    values = found(capsys, "analyze", what, folders / "memory")
    assert values


def test_the_lens_sets_runs_side_by_side(folders, capsys):
    values = found(capsys, "analyze", "lens", folders / "memory", folders / "bare",
                   "--text", folders / "other.txt")
    assert list(values) == ["memory", "bare"]
    assert values["memory"] == values["bare"] == [0.0], "one block, the last"


def test_a_run_is_like_itself(folders, capsys):
    values = found(capsys, "analyze", "cka", folders / "memory")
    np.testing.assert_allclose(values["with"]["memory"]["cka"], [[1.0]], rtol=1e-6)
    values = found(capsys, "analyze", "cka", folders / "memory", folders / "bare")
    assert 0 < values["with"]["bare"]["cka"][0][0] < 1


def test_cka_says_at_which_positions(folders, capsys, tmp_path):
    (tmp_path / "spans.txt").write_text("\n".join(f"{10 * i} {10 * i + 3}" for i in range(40)))
    (tmp_path / "nerd.txt").write_text("Anna\tperson-other\nsaw\tO\n\n" * 40)
    run, text = folders / "memory", folders / "text.txt"
    values = found(capsys, "analyze", "cka", run, "--text", text)
    assert re.fullmatch(r"last tokens of [\d,]+ names of two or more tokens in the text",
                        values["positions"])
    assert 256 < values["examples"] <= 2048
    values = found(capsys, "analyze", "cka", run, "--text", text, "--spans", tmp_path / "spans.txt")
    assert values["positions"] == "last tokens of 40 spans of a file"
    assert 4 <= values["examples"] <= 40
    np.testing.assert_allclose(values["with"]["memory"]["cka"], [[1.0]], rtol=1e-6)
    values = found(capsys, "analyze", "cka", run, "--spans", tmp_path / "nerd.txt")
    assert values["positions"] == "last tokens of 40 entities of a Few-NERD file"
    assert 4 <= values["examples"] <= 40


def test_positions_are_those_of_the_spans(folders):
    """In whole sequences, without the last token of each and without spans that a border cuts."""
    opened = open_run(RunDirectory(folders / "memory"))
    read = Text(opened, (folders / "text.txt").read_text())
    tokens_S2 = np.array([(0, 1), (3, 3), (14, 15), (15, 16), (16, 18), (17 * 4 - 3, 17 * 4 - 2),
                          (17 * 4, 17 * 4 + 2), (read.tokens_N.size - 1,) * 2])
    taken = [(tokens, places.tolist()) for tokens, places in read.ends(tokens_S2, 100)]
    assert [places for _, places in taken] == [[1, 3, 15, 3 * 16 + 15], [2]]
    np.testing.assert_array_equal(taken[1][0], list(read.inputs())[1])
    assert [places for _, places in
            ((tokens, places.tolist()) for tokens, places in read.ends(tokens_S2, 2))] == [[1, 3]]


@pytest.mark.parametrize(("name", "wanted"), [("tiny", 16), ("small", 32), ("engram-27b", 1)])
def test_as_many_sequences_are_read_as_can_be_observed(name, wanted):
    """Of engram-27b one sequence's streams after all blocks are 2.6 GB, and a batch has 1,280."""
    assert sequences(recipes.recipe(name)) == wanted
    assert sequences(changed(recipes.tiny(), {"data.sequence_length": 2**17})) == 10


def test_gates_of_the_papers_sentences(folders, capsys):
    values = found(capsys, "analyze", "gates", folders / "memory")["memory"]
    assert [example["text"] for example in values["examples"]] == list(GATED)
    for example in values["examples"]:
        assert "".join(example["pieces"]) == example["text"]
        assert np.shape(example["layers"]["0"]) == (len(example["pieces"]), 1)
    assert values["pattern_branch"] == {"0": 0}


def test_suppression_by_task_where_asked(folders, capsys, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps(
        {"task": "recall", "prompt": "kalo", "answer": " misu"}) + "\n")
    words = "analyze", "suppression", folders / "memory"
    values = found(capsys, *words)["memory"]
    assert set(values) == {"classes", "ngram_frequency", "context"}
    assert set(values["context"]) == {"seen in the context", "new in the context"}
    values = found(capsys, *words, "--tasks", tmp_path / "tasks.jsonl")["memory"]
    assert set(values["tasks"]["recall"]) == {
        "tokens", "loss", "suppressed", "likelihood_kept", "examples", "right",
        "right_suppressed"}


def test_a_memory_is_used_as_its_ids_say(folders, capsys):
    orders = found(capsys, "analyze", "memory", folders / "memory")["memory"]["layer_0"]["orders"]
    assert set(orders) == {"2", "3"}
    for order in orders.values():
        assert 0 < order["touched"] <= order["rows"]
        assert order["cache_hit_rates"] == sorted(order["cache_hit_rates"])


def test_findings_go_into_a_folder(folders, capsys, tmp_path):
    assert main.main(["analyze", "tokenizer", str(folders / "memory"), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "tokenizer.json").read_text())["memory"]["raw"] == 300
    assert capsys.readouterr().out == ""


def test_what_cannot_be_looked_at(folders, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("ka")
    (tmp_path / "bytes.txt").write_bytes(b"ka\xff")
    (tmp_path / "small.txt").write_text("kalo misu tera\n" * 50)
    (tmp_path / "far.txt").write_text("0 3\n749 751\n")
    (tmp_path / "few.txt").write_text("0 3\n5 7\n8 9\n")
    (tmp_path / "nerd.txt").write_text("Anna\tperson-other\n")
    small, few = ("--text", tmp_path / "small.txt"), ("--spans", tmp_path / "few.txt")
    memory, bare, other = (folders / name for name in ("memory", "bare", "other"))
    for words, said in (
        (("gates", bare), "run = 'bare': has no Engram"),
        (("cka", memory, other), "run = 'other': has another tokenizer than memory"),
        (("lens", memory, memory), "run = ['memory', 'memory']: must have different names"),
        (("lens", memory, "--text", tmp_path / "none.txt"), "must be a text file"),
        (("lens", memory, "--text", tmp_path / "bytes.txt"), "is not UTF-8"),
        (("lens", memory, "--text", tmp_path / "short.txt"), "text = '1 tokens': must have at"),
        (("lens", tmp_path), "holds no run"),
        (("cka", memory, *small), "has no names of two or more tokens; --spans FILE"),
        (("cka", memory, *small, "--spans", tmp_path / "far.txt"), "spans line 2 = '749 751': must "
         "be `start end` with 0 <= start < end <= 750, the text's length"),
        (("cka", memory, *small, *few), "examples = 3: must be at least 4"),
        (("cka", memory, *small, "--spans", tmp_path / "nerd.txt"), "brings its own text"),
        (("cka", memory, *few), "--spans: a file of `start end` needs --text"),
        (("cka", memory, *small, "--spans", tmp_path / "none.txt"), "spans = '"),
        (("lens", memory, *few), "--spans is of analyze cka, not of analyze lens"),
        (("lens", memory, "--tasks", "x"), "--tasks is of analyze suppression, not of analyze"),
    ):
        assert said in refused(capsys, "analyze", *words)
    (folders / "half").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folders / "half" / name).write_bytes((memory / name).read_bytes())
    assert "checkpoint" in refused(capsys, "analyze", "lens", folders / "half")


def test_a_half_written_checkpoint(folders, capsys, tmp_path):
    """One that was not committed does not count; one that lost a file is the machine's failure."""
    run, words = tmp_path / "run", ("analyze", "lens", str(tmp_path / "run"))
    shutil.copytree(folders / "memory", run)
    steps = sorted((run / "checkpoints").iterdir(), key=lambda place: int(place.name))
    assert len(steps) == 2
    (steps[1] / "commit_success.txt").unlink()
    assert main.main(list(words)) == 0
    assert capsys.readouterr().err == ""
    for place in steps[0].glob("state/d/*"):
        place.unlink()
    assert main.main(list(words)) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"engram-jax: {steps[0]}: cannot be read: ")
    assert line.count("\n") == 1
    (steps[0] / "commit_success.txt").unlink()
    assert "holds no whole checkpoint" in refused(capsys, *words)


def test_a_text_that_has_changed_is_not_read_for_the_other(folders, tmp_path, capsys):
    """Its tokens would be another text's in this run's words."""
    shutil.copytree(folders / "memory", tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["data"]["path"] = str(folders / "other.txt")
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    assert "is not the text that memory was trained on; name one with --text" in refused(
        capsys, "analyze", "lens", tmp_path / "moved")
    assert found(capsys, "analyze", "lens", tmp_path / "moved", "--text", folders / "other.txt")


def test_sentences_that_a_tokenizer_has_no_token_for_are_left_out(folders, capsys, monkeypatch):
    monkeypatch.setattr(analyses, "GATED", ("", *GATED))
    values = found(capsys, "analyze", "gates", folders / "memory")["memory"]
    assert [example["text"] for example in values["examples"]] == list(GATED)


def test_documents_stay_apart_in_the_text_that_is_read(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(
        json.dumps({"text": f"kalo misu {number} tera"}) + "\n" for number in range(900)))
    run = micro(str(tmp_path / "text.jsonl"))
    inputs = open_inputs(run)
    text = validation_text(
        Opened(run=run, reader=inputs, state=None))
    documents = text.split("\n\n")
    assert len(documents) > 3
    assert all(document.startswith("kalo misu") for document in documents[1:])
    assert inputs.end_id not in inputs.tokenizer.encode(text).ids


def test_side_files_are_read_as_training_reads(folders, capsys, tmp_path):
    """A byte order mark is no part of them, line ends are; spans are counted in the file as it
    is."""
    run, lines = folders / "memory", (folders / "text.txt").read_text().split("\n")
    text = "\r\n".join(lines)
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    starts = [match.start() for match in re.finditer("No_me", text)][:40]
    (tmp_path / "spans.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(
        f"{start} {start + 5}" for start in starts).encode())
    values = found(capsys, "analyze", "cka", run, "--text", tmp_path / "text.txt",
                   "--spans", tmp_path / "spans.txt")
    assert values["positions"] == "last tokens of 40 spans of a file"
    (tmp_path / "tasks.jsonl").write_bytes(
        b'\xef\xbb\xbf{"task": "c", "prompt": "ka", "answer": " lo"}\r\n')
    values = found(capsys, "analyze", "suppression", run, "--text", tmp_path / "text.txt",
                   "--tasks", tmp_path / "tasks.jsonl")
    assert values["memory"]["tasks"]["c"]["examples"] == 1
    opened = open_run(RunDirectory(run))
    read = Text(opened, read_file(tmp_path / "text.txt", "text"))
    assert read.text == text
    first, last = analyses.spans.tokens_of([(starts[7], starts[7] + 5)], read.offsets_N2)[0]
    assert text[read.offsets_N2[first, 0] : read.offsets_N2[last, 1]].strip() == "No_me"


def test_a_text_that_spells_an_end_token_is_analysed_as_it_is_trained_on(folders):
    opened = open_run(RunDirectory(folders / "memory"))
    ids = opened.tokens("kalo <|end|> lo")
    assert opened.reader.end_id not in ids
    assert opened.reader.tokenizer.decode(ids.tolist()) == "kalo <|end|> lo"
