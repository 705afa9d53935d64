"""Several sources as one: shares, order, end."""

import itertools
import json

import pytest
from texts import changed, documents, prose, read_all, write_documents

from engram_jax.data import mixtures, reading, sources, tokens
from engram_jax.errors import UserError
from engram_jax.settings import with_settings


@pytest.fixture
def three(tmp_path):
    """Names of three sources: short documents, long ones, and few."""
    (tmp_path / "short.jsonl").write_text("\n".join(
        json.dumps({"text": f"short {prose(seed, 5)}"}) for seed in range(400)))
    return [str(tmp_path / "short.jsonl"),
            write_documents(tmp_path / "long", [f"long {prose(seed, 90)}" for seed in range(60)]),
            write_documents(tmp_path / "few", [f"few {prose(seed, 20)}" for seed in range(60)])]


def mixed(settings, paths, weights):
    config = changed(settings, mixture=tuple(map("{}={}".format, paths, weights)))
    return config, list(sources.open_source(config).documents())


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (3, 5, 1e-3)])
def test_shares_hold_from_the_beginning_to_the_end(settings, three, weights):
    _, texts = mixed(settings, three, weights)
    longest = max(len(text.encode()) for text in texts)
    given = dict.fromkeys(("short", "long", "few"), 0)
    for text in texts:
        given[text.split()[0]] += len(text.encode())
        for name, weight in zip(given, weights, strict=True):
            assert abs(given[name] - weight / sum(weights) * sum(given.values())) <= 2 * longest
    assert len(texts) > 60


def test_documents_keep_their_order_and_none_comes_twice(settings, three):
    _, texts = mixed(settings, three, (0.5, 0.3, 0.2))
    assert len(set(texts)) == len(texts)
    for path in three:
        own = documents(settings, path)
        assert [text for text in texts if text in own] == own[:sum(t in own for t in texts)]


def test_a_mixture_ends_where_the_next_source_has_no_more():
    sources = [iter([reading.Part("aa"), reading.Part("bb")]),
               iter(reading.Part(str(number)) for number in itertools.count())]
    texts = [part.text for part in mixtures.mixed(sources, [1, 1])]
    assert texts == ["aa", "0", "1", "bb", "2", "3"]


def test_a_long_document_stays_whole():
    long = [reading.Part("a" * 9, ends=False), reading.Part("b" * 9)]
    sources = [iter([*long, reading.Part("c")]), iter(reading.Part("x") for _ in range(99))]
    parts = [part.text for part in mixtures.mixed(sources, [1, 1])]
    assert parts[:4] == ["a" * 9, "b" * 9, "x", "x"]
    assert parts.index("c") == 2 + 18


def test_a_mixture_is_packed_once_and_always_the_same(settings, three, tmp_path):
    config, texts = mixed(settings, three, (0.5, 0.3, 0.2))
    first = tokens.open_tokens(config)
    assert first.documents == len(texts)
    again = tokens.open_tokens(changed(config, cache_dir=str(tmp_path / "other")))
    assert (again.sha256, again.train_sha256) == (first.sha256, first.train_sha256)
    other, _ = mixed(settings, three, (0.5, 0.2, 0.3))
    assert tokens.open_tokens(other).fingerprint != first.fingerprint
    assert len(read_all(first.train)) == first.train_tokens


def test_a_mixture_is_set_at_the_command_line(settings, three):
    made = with_settings(settings, [f'mixture={json.dumps([f"{path}=0.5" for path in three])}'])
    assert made.mixture == tuple(f"{path}=0.5" for path in three)
    assert made.sources == tuple(three)


@pytest.mark.parametrize("mixture", [
    ("stdlib",), ("stdlib=",), ("stdlib=0",), ("stdlib=-1",), ("stdlib=nan",), ("stdlib=inf",),
    ("=1",), ("stdlib=1", "stdlib=2"), ("stdlib=much",)])
def test_mixtures_that_are_none(settings, mixture):
    with pytest.raises(UserError, match=r"^data\.mixture = "):
        sources.open_source(changed(settings, mixture=mixture))


def test_a_source_of_a_mixture_is_named_in_errors(settings, three, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\nx")
    for path, message in (("no/such", r"^data\.mixture = 'no/such': does not exist"),
                          (tmp_path / "bad.jsonl", r"^data\.text_field = .*bad\.jsonl")):
        with pytest.raises(UserError, match=message):
            mixed(settings, [*three, str(path)], (1, 1, 1, 1))
