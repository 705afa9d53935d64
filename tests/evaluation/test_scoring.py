"""Scores of given tokens equal those of the network run directly; RULER asks a served run."""

import dataclasses
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.cli.main import main
from engram_jax.errors import UserError
from engram_jax.evaluation import ruler, ruler_scores
from engram_jax.evaluation.haystack import Source
from engram_jax.evaluation.longppl import KeyTokens, key_tokens, perplexities
from engram_jax.evaluation.scoring import SHORTEST, Scorer
from engram_jax.inference.serving import served
from engram_jax.model import transformer
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import changed

TIME = 40


@pytest.fixture(scope="module", name="model")
def a_served_run(trained, compilations):
    model = served(RunDirectory(trained))
    yield model
    model.rows.close()


@pytest.fixture(scope="module", name="tokens")
def some_tokens(model):
    return np.random.default_rng(0).integers(
        0, model.reader.vocab_size, (5, TIME + 1)).astype(np.int32)


def directly(model, tokens_BT, targets_BT):
    """All logits at once."""
    rows = dict(model.rows.request(tokens_BT))
    logits_BTV, _ = transformer.apply(
        model.params, jnp.asarray(tokens_BT), rows, model.router_bias, model.run.model,
        jnp.zeros(tokens_BT.shape, bool).at[:, 0].set(True))
    logits = np.asarray(logits_BTV, np.float64)
    losses = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
    return losses - picked, logits.argmax(-1) == targets_BT


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_those_of_the_network(model, tokens, batch_size):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    losses, greedy = directly(model, inputs, targets)
    scores = Scorer(model, batch_size)(inputs, targets)
    np.testing.assert_allclose(scores.losses_BT, losses, atol=1e-4)
    np.testing.assert_array_equal(scores.greedy_BT, greedy)


def test_greedy_tokens_are_found(model, tokens):
    """Of what the network says itself, every token is greedy."""
    scorer, inputs = Scorer(model), tokens[:2, :-1]
    logits, _ = transformer.apply(
        model.params, jnp.asarray(inputs), dict(model.rows.request(inputs)), model.router_bias,
        model.run.model, jnp.zeros(inputs.shape, bool).at[:, 0].set(True))
    assert scorer(inputs, np.asarray(logits.argmax(-1), np.int32)).greedy_BT.all()


@pytest.mark.parametrize("memory", ["host", "disk"])
def test_tables_off_the_device_score_the_same(trained, model, tokens, memory):
    other = served(RunDirectory(trained), memory)
    try:
        there = Scorer(other)(tokens[:, :-1], tokens[:, 1:])
    finally:
        other.rows.close()
    here = Scorer(model)(tokens[:, :-1], tokens[:, 1:])
    np.testing.assert_array_equal(there.losses_BT, here.losses_BT)


def test_lengths_are_rounded_up_without_a_trace(model, tokens):
    """What fills a sequence up comes after it and changes nothing."""
    scorer = Scorer(model)
    whole = scorer(tokens[:, :-1], tokens[:, 1:]).losses_BT
    for time in (1, SHORTEST, SHORTEST + 1):
        part = scorer(tokens[:, :time], tokens[:, 1:time + 1]).losses_BT
        np.testing.assert_allclose(part, whole[:, :time], atol=1e-5)


def test_losses_of_a_text_feed_longppl(model, tokens):
    losses = Scorer(model).losses(tokens[0])
    assert losses.shape == (TIME + 1,)
    assert losses[0] == 0
    assert Scorer(model).losses(tokens[0, :1]).tolist() == [0]
    key = key_tokens(Scorer(model).losses, tokens[0], KeyTokens(gain=-10, likely=99, window=8,
                                                                 slide=4))
    np.testing.assert_array_equal(key, np.arange(8, TIME + 1))  # all that a window can tell
    found = perplexities(Scorer(model).losses, [(tokens[0], key)])
    assert found.plain == pytest.approx(np.exp(losses[1:].mean()), rel=1e-6)
    assert found.long == pytest.approx(np.exp(losses[key].mean()), rel=1e-6)


def test_what_does_not_fit_is_refused(model, tokens):
    with pytest.raises(UserError, match="batch_size = 0"):
        Scorer(model, 0)
    with pytest.raises(UserError, match=r"targets\.shape"):
        Scorer(model)(tokens, tokens[:, 1:])
    with pytest.raises(UserError, match="token id"):
        Scorer(dataclasses.replace(model))(tokens[:, :-1] + 10**6, tokens[:, 1:])


@pytest.fixture(scope="module", name="prose")
def a_text():
    licence = pathlib.Path(__file__).parents[2] / "LICENSE"
    return re.sub(r"[^A-Za-z0-9.,!?' ]+", " ", licence.read_text())


def test_a_run_is_asked_and_scored(model, prose, monkeypatch):
    """It knows nothing; with the references put into its mouth it knows all."""
    longer = dataclasses.replace(model, run=changed(model.run, {"data.sequence_length": 1200}))
    source = Source(prose, model.reader.tokenizer)
    settings = {"lengths": [1200], "tasks": ["niah_single_1", "qa_single"], "samples": 2}
    scores = ruler_scores.measured(longer, source, **settings)
    assert [(score.task, score.samples, score.score) for score in scores] == [
        ("niah_single_1", 2, 0), ("qa_single", 2, 0)]
    said = ruler_scores.described(scores)
    assert "niah_single_1" in said
    assert "1,200" in said
    asked = [one for task in settings["tasks"] for one in ruler.samples(source, task, 1200, 2)]
    answers = iter([list(source.tokenizer.encode(" ".join(one.references)).ids) for one in asked])
    monkeypatch.setattr("engram_jax.inference.engine.Engine.generate",
                        lambda engine, requests: [next(answers) for _ in requests])
    again = ruler_scores.measured(longer, source, **settings)
    assert [score.score for score in again] == [100, 100]


def test_evaluate_asks_rulers_questions_or_says_why_not(trained, capsys, tmp_path, prose):
    assert main(["evaluate", str(trained), "--ruler", "99"]) == 2
    assert "ruler = 99: is beyond the 16 tokens" in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--ruler", "x"]) == 2
    assert "must be lengths in tokens" in capsys.readouterr().err
    (tmp_path / "prose.txt").write_text(prose)
    assert main(["evaluate", str(trained), "--ruler", "16", "--text", str(tmp_path / "prose.txt"),
                 "--tasks", "vt"]) == 2
    assert "task vt needs at least" in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


def test_validation_text_is_where_questions_come_from_by_default(trained, capsys):
    """The made-up text of the tests has too few sentences and words for it, and says so."""
    assert main(["evaluate", str(trained), "--ruler", "16"]) == 2
    assert "text = " in capsys.readouterr().err
