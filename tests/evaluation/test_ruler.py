"""RULER's tasks: an oracle that reads the text answers all, lengths are exact, seeds repeat."""

import collections
import hashlib
import pathlib
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_jax.errors import UserError
from engram_jax.evaluation.haystack import Source, generator
from engram_jax.evaluation.ruler import COLUMNS, SLACK, TASKS, samples, score

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 1024


@pytest.fixture(scope="module", name="text")
def a_text():
    text = "\n".join((ROOT / name).read_text() for name in ("LICENSE", "README.md", "BUILD.md"))
    return re.sub(r"[^A-Za-z0-9.,!?' ]+", " ", text)


@pytest.fixture(scope="module", name="source")
def a_source(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return Source(text, tokenizer)


def oracle(sample):
    """What somebody who reads the prompt answers; it knows the tasks and not the references."""
    prompt = sample.prompt
    if sample.task.startswith("niah"):
        asked = re.search(r"does the text give for (.*)\?$", prompt)[1]
        keys = re.split(r", | and ", asked)
        return " ".join(value for key in keys for value in re.findall(
            rf"One of the special \w+ for {re.escape(key)} is: (\S+)\.", prompt))
    if sample.task == "vt":
        value = re.search(r"have the value (\d+) in the end", prompt)[1]
        known, chosen = {}, []
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
            known[name] = known.get(given, given)
            chosen += [name] if known[name] == value else []
        return " ".join(chosen)
    if sample.task == "cwe":
        counts = collections.Counter(re.findall(r"\d+\. (\w+)", prompt))
        return " ".join(word for word, _ in counts.most_common(10))
    if sample.task == "fwe":
        coded = prompt.split("out.\n")[1].split("\nWhich")[0].split()
        return " ".join(word for word, _ in collections.Counter(coded).most_common(4)
                        if word != "...")
    context, question = prompt.rsplit("\n\nQuestion: ", 1)
    if sample.task == "qa_single":
        gap = question.split("sentence? ", 1)[1]
        pattern = re.escape(gap).replace("____", "([A-Za-z]+)", 1).replace("____", r"\1")
        return re.search(pattern, context)[1]
    opening = re.search(r"begins with '(.*)' is called", context)[1]
    sentence = re.search(rf"\n({re.escape(opening)}.*)(?:\n|$)", context.split("Document 1:")[1])[1]
    return max(re.findall(r"[A-Za-z]+", sentence), key=len)


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_knows_all_and_a_stranger_nothing(source, task):
    made = list(samples(source, task, LENGTH, 6))
    answers = [oracle(sample) for sample in made]
    assert [score(sample, answer) for sample, answer in zip(made, answers, strict=True)] == [1] * 6
    others = [score(sample, answer)
              for sample, answer in zip(made, answers[1:] + answers[:1], strict=True)]
    assert sum(others) / 6 < 0.2, others


@pytest.mark.parametrize("length", [768, 2000])
@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_as_long_as_asked(source, task, length):
    for sample in samples(source, task, length, 3):
        used = source.count(sample.prompt + sample.prefix) + sample.answer_tokens
        assert (1 - SLACK) * length <= used <= length
        assert all(reference in sample.prompt for reference in sample.references)


def test_the_same_seed_gives_the_same_samples_on_any_machine(source):
    first, again, other = (
        [sample.prompt for task in TASKS for sample in samples(source, task, LENGTH, 2, seed)]
        for seed in (0, 0, 1))
    assert first == again
    assert not set(first) & set(other)


def test_the_draws_are_those_of_every_version_of_python():
    """Of a text that never changes: what Python draws from a text as seed is fixed since 3.2."""
    draw = generator(0, "vt", 4096, 7)
    drawn = [draw.randint(0, 10**6) for _ in range(8)] + draw.sample(range(1000), 5)
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "596781b185e73a95"


def test_all_thirteen_are_there():
    assert len(TASKS) == 13
    assert sorted(task for tasks in COLUMNS.values() for task in tasks) == sorted(TASKS)


def test_what_cannot_be_made_is_refused(source, text):
    def refused(*arguments, source=source):
        with pytest.raises(UserError) as error:
            list(samples(source, *arguments))
        return str(error.value)

    assert "must be one of niah_single_1" in refused("niah", LENGTH, 1)
    assert "needs at least" in refused("niah_multiquery", 200, 1)
    few = Source("One two. " * 50, source.tokenizer)
    assert "at least 100 different words" in refused("niah_single_1", LENGTH, 1, source=few)
    assert "use a longer text" in refused("cwe", 100_000, 1)
    dumb = Tokenizer(models.WordLevel({"the": 0, "<unk>": 1}, unk_token="<unk>"))
    dumb.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "cannot spell" in refused("niah_single_1", LENGTH, 1, source=Source(text, dumb))
