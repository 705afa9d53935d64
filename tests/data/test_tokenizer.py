"""Tokenizers: trained ones, and anybody's."""

import json
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import changed, fuzzed, prose
from tokenizers import AddedToken, Tokenizer, models

from engram_jax.config import DataConfig
from engram_jax.data import tokenizer, tokens
from engram_jax.errors import UserError

SMALL = tokenizer.train_bpe([prose(0, 300)], 262).to_str().encode()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3), max_leaves=5)


def test_a_trained_tokenizer_loses_nothing_and_is_always_the_same(settings):
    first = tokenizer.train_bpe([prose(0, 500)], 300)
    assert first.to_str() == tokenizer.train_bpe([prose(0, 500)], 300).to_str()
    assert first.get_vocab_size() == 300
    text = "  kara\t¡ñandú! \U0001f600\r\n\n  日本"
    assert first.decode(first.encode(text).ids) == text
    assert (tokenizer.find_end_id(first), tokenizer.find_pad_id(first)) == (0, 1)


@pytest.mark.parametrize("where", ["file", "folder", "hub"])
def test_anybody_s_tokenizer(tmp_path, settings, monkeypatch, where):
    own = tokenizer.train_bpe([prose(0, 500)], 270)
    own.enable_truncation(3)
    own.enable_padding(length=1000)
    (tmp_path / "tok").mkdir()
    own.save(str(tmp_path / "tok" / "tokenizer.json"))
    monkeypatch.setattr(tokenizer, "Tokenizer", types.SimpleNamespace(
        from_pretrained=lambda name: own if name == "some/name" else None,
        from_str=Tokenizer.from_str))
    name = {"file": str(tmp_path / "tok" / "tokenizer.json"), "folder": str(tmp_path / "tok"),
            "hub": "some/name"}[where]
    data = tokens.open_tokens(changed(settings, tokenizer=name))
    assert data.vocab_size == 270
    assert data.train_tokens > 1000  # neither truncated nor padded
    assert data.train_bytes > data.train_tokens


@pytest.mark.parametrize(("name", "message"), [
    ("bpe:many", "must be bpe:SIZE with a size of at least 258"),
    ("bpe:257", "at least 258"),
    ("./none.json", "No such file"),
    ("nobody/nothing", "no such repository$"),
])
def test_tokenizers_that_are_not(settings, monkeypatch, name, message):
    def from_pretrained(name):
        raise Exception("no such repository\nat all")

    monkeypatch.setattr(tokenizer, "Tokenizer", types.SimpleNamespace(
        from_pretrained=from_pretrained, from_str=Tokenizer.from_str))
    with pytest.raises(UserError, match=message) as caught:
        tokens.open_tokens(changed(settings, tokenizer=name))
    assert str(caught.value).startswith(f"data.tokenizer = {name!r}: must be bpe:SIZE")


def test_a_file_that_is_no_tokenizer(tmp_path, settings):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer = .*a\.json"):
        tokens.open_tokens(changed(settings, tokenizer=str(tmp_path / "a.json")))


@pytest.mark.parametrize(("special", "plain", "end", "pad"), [
    (["<s>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"], [], 1, 2),
    (["<|endoftext|>"], [], 0, 0),
    (["<|end|>", "<|endoftext|>"], [], 1, 1),
    (["<|begin_of_text|>", "<|end_of_text|>"], [], 1, 1),
    (["<pad>", "<eos>"], ["</s>"], 1, 0),
    (["[PAD]", "[CLS]", "[SEP]"], ["<|endoftext|>", "<pad>"], 2, 0),
    ([], ["a", "</s>"], 1, 1),
])
def test_end_and_pad_tokens(special, plain, end, pad):
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(special + plain)}))
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    assert tokenizer.find_end_id(made) == end
    assert tokenizer.find_pad_id(made) == pad


def test_a_tokenizer_without_an_end():
    made = Tokenizer(models.WordLevel({"a": 0}))
    with pytest.raises(UserError, match=r"data\.tokenizer: has no token to end a document"):
        tokenizer.find_end_id(made)


def test_a_kept_tokenizer_that_has_changed_is_trained_again(settings, tmp_path):
    first = tokens.open_tokens(settings)
    kept, = (tmp_path / "cache" / "tokenizers").glob("*.json")
    before = kept.read_bytes()
    for damaged in (before[:-50], b"", b"\xff", before.replace(b"<|pad|>", b"<|dap|>"),
                    tokenizer.train_bpe([prose(5, 900)], 290).to_str().encode()):
        kept.write_bytes(damaged)
        assert tokens.open_tokens(settings) == first
        assert kept.read_bytes() == before


@fuzzed
@given(data=st.data())
def test_any_bytes_are_a_tokenizer_or_one_clear_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    content = bytearray(SMALL)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    else:
        values = json.loads(SMALL)
        node, key = values, data.draw(st.sampled_from(sorted(values)))
        while isinstance(node[key], dict) and node[key] and data.draw(st.booleans()):
            node, key = node[key], data.draw(st.sampled_from(sorted(node[key])))
        node[key] = data.draw(VALUES)
        content = json.dumps(values).encode()
    file.write_bytes(content)
    message = "data.tokenizer = "
    try:
        made = tokenizer.ready_tokenizer(DataConfig(tokenizer=str(file)), "")
        made.encode("kara <|end|> lono", add_special_tokens=False)
    except UserError as error:
        message = str(error)
    assert message.startswith("data.tokenizer = ")
    assert "\n" not in message
