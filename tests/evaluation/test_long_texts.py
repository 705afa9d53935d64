"""LongPPL and perplexity by position of a run, from the command line to its folder."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from engram_jax.cli.main import main
from engram_jax.errors import UserError
from engram_jax.evaluation import long_texts
from engram_jax.evaluation.longppl import KeyTokens
from engram_jax.evaluation.scoring import Scorer
from engram_jax.inference.serving import served
from engram_jax.results.scores import scores_of
from engram_jax.runs.directory import RunDirectory

LENGTH = 16  # that the run was trained at


@pytest.fixture(scope="module", name="model")
def a_served_run(trained, compilations):
    model = served(RunDirectory(trained))
    yield model
    model.rows.close()


TEXT = "kalo misu tera novi pedu kaka lolo mimi susu tete rara nono vivi pepe dudu " * 6


def test_pieces_are_as_long_as_asked(model):
    whole = model.reader.tokenizer.encode(TEXT).ids
    pieces = long_texts.pieces(model, TEXT, LENGTH, 3)
    assert len(pieces) == 3
    assert "".join(pieces) == TEXT[:len("".join(pieces))]
    assert [model.reader.tokenizer.encode(piece).ids for piece in pieces] == [
        whole[at:at + LENGTH] for at in (0, LENGTH, 2 * LENGTH)]
    for length, limit, line in ((LENGTH + 1, 1, "length = 17: must be in 2..16"),
                                (LENGTH, 0, "limit = 0")):
        with pytest.raises(UserError, match=line):
            long_texts.pieces(model, TEXT, length, limit)
    with pytest.raises(UserError, match="is shorter than one piece of 16 tokens"):
        long_texts.pieces(model, "kalo", LENGTH, 1)


def test_perplexities_are_those_of_the_losses(model):
    pieces = long_texts.pieces(model, TEXT, LENGTH, 4)
    masked = [long_texts.Masked(piece, [(0, len(piece))] if number < 2 else [])
              for number, piece in enumerate(pieces)]
    values = long_texts.measured(model, masked, batch_size=1)
    losses = np.stack([Scorer(model, 1).losses(np.array(
        model.reader.tokenizer.encode(piece).ids, np.int32)) for piece in pieces])
    assert values.perplexities.plain == pytest.approx(math.exp(losses[:, 1:].mean()), rel=1e-5)
    assert values.perplexities.long == pytest.approx(math.exp(losses[:2, 1:].mean()), rel=1e-5)
    assert values.positions == [(1, LENGTH - 1, pytest.approx(values.perplexities.plain))]
    assert long_texts.edges(100) == [1, 25, 50, 100]
    assert long_texts.edges(16) == [1, 16]


def test_a_run_tells_the_key_tokens_of_another(model, trained, tmp_path, capsys):
    """With a rule that takes every token behind the first window; the file says the same again."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["evaluate", str(tmp_path / "run"), "--text", str(tmp_path / "text.txt"),
             "--longppl", str(trained), "--window", "4", "--slide", "4", "--limit", "2",
             "--keep-masks", str(tmp_path / "masks.json"), "--batch-size", "1"]
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["tokens"] == 2 * (LENGTH - 1)
    rule = KeyTokens(window=4, slide=4)
    expected = long_texts.masked_by(model, long_texts.pieces(model, TEXT, LENGTH, 2), rule, 1)
    assert long_texts.read_masks(tmp_path / "masks.json") == expected
    assert main(["evaluate", str(tmp_path / "run"), "--longppl", str(tmp_path / "masks.json"),
                 "--batch-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "LongPPL" in said
    assert f"perplexity {first['perplexity']:.4f} on {first['tokens']} tokens" in said
    kept = {score.name: score for score in scores_of(RunDirectory(tmp_path / "run"))}
    assert kept["positions all at 16"].value == pytest.approx(first["perplexity"])
    assert kept["positions all at 16"].step == 7


def test_positions_need_no_evaluator(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--positions", "--limit", "2", "--json",
                 "--batch-size", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["longppl"], values["key_tokens"]) == (None, 0)
    assert [(band["first"], band["last"]) for band in values["by_position"]] == [(1, 15)]


@pytest.mark.parametrize(("more", "line"), [
    (["--longppl", "RUN"], "window = 4096: must be below the 16 tokens of a text"),
    (["--longppl", "RUN", "--window", "0"], "longppl.window = 0: must be at least 1"),
    (["--longppl", "nowhere"], "holds no run"),
    (["--longppl", "MASKS", "--text", "x.txt"], "text = 'x.txt': is in the file of masks"),
    (["--longppl", "MASKS"], "is longer than the 16 that the run was trained at"),
    (["--positions", "--length", "99"], "length = 99: must be in 2..16"),
    (["--positions", "--step", "5"], "step = 5: .* has no checkpoint of it; there are 6, 7")])
def test_bad_input_is_one_line(trained, tmp_path, capsys, more, line):
    (tmp_path / "m.json").write_text(json.dumps({"texts": [{"text": TEXT, "spans": []}]}))
    more = [{"RUN": str(trained), "MASKS": str(tmp_path / "m.json")}.get(word, word)
            for word in more]
    assert main(["evaluate", str(trained), *more]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(line, error), error
    assert not (trained / "scores.json").exists()


@pytest.mark.parametrize("text", [
    "[]", "{}", '{"texts": []}', '{"texts": [1]}', '{"texts": [{"text": "ab"}]}',
    '{"texts": [{"text": "ab", "spans": [[1]]}]}', '{"texts": [{"text": "ab", "spans": [[0, 9]]}]}',
    '{"texts": [{"text": "abc", "spans": [[1, 2], [0, 1]]}]}', "x"])
def test_a_file_that_holds_no_masks_is_refused(tmp_path, text):
    (tmp_path / "masks.json").write_text(text)
    with pytest.raises(UserError, match=r"masks\.json"):
        long_texts.read_masks(tmp_path / "masks.json")
