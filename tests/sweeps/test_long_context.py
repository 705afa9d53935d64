"""The experiment on long contexts: its language, its arms and what is made of their answers."""

import hashlib
import itertools

import pytest

from engram_jax.costs.accounting import account
from engram_jax.results.statistics import interval
from experiments.long_context import arms, language, report, run
from experiments.long_context.language import KINDS, LONG, NAMES, PHRASE, SHORT, VALUES


@pytest.mark.parametrize("texts", [SHORT, LONG])
def test_a_text_has_its_length_and_a_name_one_value(texts):
    tokenizer = language.tokenizer()
    told = []
    for text, _ in zip(language.documents(texts), range(40), strict=False):
        ids = tokenizer.encode(text).ids
        assert len(ids) == texts.length - 1
        assert tokenizer.decode(ids) == text
        words = text.split()
        pairs = {(name, value) for name, value in itertools.pairwise(words) if name in NAMES}
        assert 1 <= len(pairs) == len({name for name, _ in pairs}) <= texts.names
        assert all(value in VALUES for _, value in pairs)
        told.append(dict(pairs))
    values = {one[name] for one in told for name in one if name == "k3"}
    assert len(values) > 3, "another text, another value"


def test_the_same_seed_gives_the_same_bytes():
    text = "\n".join(text for text, _ in zip(language.documents(SHORT), range(9), strict=False))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8e13e7a04eeb2174"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 129])
def test_a_needle_is_told_once_and_asked_at_the_end(kind, length):
    needles, tokenizer = KINDS[kind], language.tokenizer()
    tokens_NT, answers_NT = language.needles(needles, length, 8)
    assert tokens_NT.shape == answers_NT.shape == (8, length)
    for tokens_T, answers_T in zip(tokens_NT, answers_NT, strict=True):
        words = [tokenizer.id_to_token(int(token)) for token in tokens_T]
        assert answers_T.sum() == needles.asked
        assert answers_T[-1]
        haystack = words[:length - 2 * needles.asked]
        assert sum(word in NAMES for word in haystack) == needles.told
        for place in answers_T.nonzero()[0]:
            at = haystack.index(words[place - 1])
            assert haystack[at + 1] == words[place] in VALUES
    assert len(language.phrases()[0].split()) == PHRASE


def test_the_arms_have_the_same_parameters_and_flops():
    bases = arms.bases("folder")
    experts, engram = (account(bases[name]) for name in ("experts", "engram"))
    assert engram.total_params == pytest.approx(experts.total_params, rel=1e-3)
    assert engram.flops_per_token == pytest.approx(experts.flops_per_token, rel=1e-2)
    assert engram.engram_params > 0.2 * engram.total_params
    assert LONG.length == 8 * SHORT.length


def rows():
    return [{"seed": seed, "arm": arm, "step": 600, "loss": 1.4, "long_loss": 1.5,
             "total_params": 10, "memory_params": 2, "flops_per_token": 7, "stage": stage,
             "kind": kind, "length": length, "answers": 128,
             "right": {"before": 0.1, "stretched": 0.2, "after": 0.9}[stage] + 0.01 * seed,
             "answer_loss": 1.0}
            for seed in (0, 1, 2) for arm in report.ARMS for stage in report.STAGES
            for kind in KINDS for length in (64, 512)]


def test_the_table_has_every_arm_and_the_papers_numbers():
    text = report.table(rows())
    for word in ("0.9100", "engram-equal-loss", "multi-query at 512 tokens", "84.2", "97.0"):
        assert word in text, word
    assert str(interval([0.9, 0.91, 0.92])) in text
    assert len(report.figure(rows()).axes) == len(KINDS)


def test_words_that_name_no_folder_or_seed(capsys):
    for words in ([], ["folder", "x"]):
        assert run.main(words) == 2
        assert "FOLDER [SEED ...]" in capsys.readouterr().err
    assert language.main([]) == 2
    assert "FOLDER" in capsys.readouterr().err
