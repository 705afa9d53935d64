"""Facts: what is written is what is asked, and arms have equal totals."""

import collections
import json

import numpy as np
import pytest

from engram_jax.costs.accounting import account
from engram_jax.data import tokenizer as tokenizers
from experiments.capacity import configs, facts, report


@pytest.fixture(scope="module")
def tokenizer():
    """Of words that come often enough to be one token each, with capitals and without."""
    stems = [a + b + c for a in "bdfgk" for b in ("ar", "el", "in", "os") for c in ("ta", "mu")]
    text = " ".join(f"{stem} {stem.title()}" for stem in stems) + "\n"
    return tokenizers.train_bpe([text] * 40, 700)


@pytest.fixture(scope="module")
def told(tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "PLAIN", 5)
        patch.setattr(facts, "TWINS", 4)
        patch.setattr(facts, "ANSWERS", 20)
        return facts.facts(tokenizer)


def test_a_fact_is_four_tokens_and_its_key_is_one_fact_s(told, tokenizer):
    assert len(told) == 9 * len(facts.TIMES)
    assert len({(fact.first, fact.second) for fact in told}) == len(told)
    for fact in told:
        assert len(tokenizer.encode("\n" + fact.line, add_special_tokens=False).ids) == 5
    twins = [fact for fact in told if fact.kind == "twin"]
    for small, large in zip(twins[::2], twins[1::2], strict=True):
        assert small.first.title() == large.first != small.first
        assert small.second == large.second
        assert small.answer != large.answer


def test_each_fact_is_told_as_often_as_the_list_says(told, monkeypatch):
    monkeypatch.setattr(facts, "open_source", lambda config: type(
        "Source", (), {"documents": lambda self: iter(["x = 1\n"] * 3)})())
    documents = list(facts.documents(told))
    assert documents[:3] == ["x = 1\n"] * 3
    lines = collections.Counter(
        line + "\n" for text in documents[3:] for line in text.splitlines())
    assert lines == {fact.line: fact.times for fact in told}
    assert documents == list(facts.documents(told))


class Oracle:
    """Knows the plain facts, and nothing without its rows."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def tokens(self, text):
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def test_answers_are_asked_for_and_nothing_else(told, tokenizer, monkeypatch):
    oracle, plain = Oracle(tokenizer), {}
    for fact in told:
        key = tuple(oracle.tokens(fact.line)[:3].tolist())
        plain[key] = fact.kind == "plain"

    def losses(opened, tokens_BT, scale):
        row = tokens_BT[0].tolist()
        known = [plain.get(tuple(row[max(0, n - 2) : n + 1]), False) for n in range(1, len(row))]
        return np.where(known, 0.1 if scale else 5.0, 5.0)[None]

    monkeypatch.setattr(report, "token_losses", losses)
    rows = list(report.recall(oracle, told))
    assert len(rows) == 2 * len(facts.TIMES)
    for row in rows:
        assert row["facts"] == (5 if row["kind"] == "plain" else 4)
        assert row["recalled"] == (5 if row["kind"] == "plain" else 0)
        assert row["recalled_without_rows"] == 0
    run = {"name": "table-seed0", "seed": 0, "total_params": 1000}
    text = report.table([{**run, **row} for row in rows])
    assert text.splitlines()[1].split() == ["table", "1,000", "30", "30.000", *["1.000"] * 6]
    assert len(report.figure([{**run, **row} for row in rows]).axes) == 2


def test_the_list_is_read_as_it_was_written(told, tmp_path):
    rows = [list(vars(fact).values()) for fact in told]
    (tmp_path / facts.LIST).write_text(json.dumps(rows))
    assert facts.read(tmp_path) == told


def test_table_experts_and_dense_have_equal_totals():
    arms = {arm.name: account(arm).total_params for arm in configs.arms("tiny")}
    equal = [arms[name] for name in ("table", "experts", "dense", "table-raw-keys")]
    assert max(equal) < 1.02 * min(equal)
    assert arms["no-memory"] < arms["small-table"] < 0.7 * min(equal)
    assert [run.name for run in configs.runs("tiny", (0,))][:2] == ["table-seed0", "experts-seed0"]
