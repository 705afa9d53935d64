"""Spans: names in a text, the two forms of files, and the tokens that end them in any script."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engram_jax.errors import UserError
from engram_jax.insides import spans


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level: each byte a token, and three merges; a word may begin with its space."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "D"), ("ĠD", "i"), ("n", "a")]
    words = [*letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def named(text):
    return [text[start:end] for start, end in spans.names(text)]


@pytest.mark.parametrize(("text", "found"), [
    ("This study looks at Diana, Princess of Wales.", ["This", "Diana", "Princess", "Wales"]),
    ("The whale, the Sperm Whale; the ship", ["Sperm Whale"]),
    ("the end. He saw it. Then he left, and then Anna left.", ["Anna"]),
    ("we saw Anna. Anna saw “Bert”", ["Anna", "Anna", "Bert"]),
    ("the big wave. Big waves broke on Big Sur.", ["Big Sur"]),
    ("near Saint-Malo with O’Brien, Ahab's mate", ["Saint-Malo", "O’Brien", "Ahab"]),
    ("nahe Łódź und in Москва, near Ærø\nor Ἀθῆναι", ["Łódź", "Москва", "Ærø", "Ἀθῆναι"]),
    ("de _Pequod_ en de _boot_", ["Pequod"]),
    ("中国四大发明包括：造纸术", []),
    ("no names here, e.g. 3.14 and _so_ on", []),
])
def test_names_in_prose(text, found):
    assert named(text) == found


def test_identifiers_in_code():
    text = "x = read_file(os.path.join(a, b1), camelCase=x.y) + größe_in_m - _private * 2.5e3"
    assert named(text) == ["read_file", "os.path.join", "camelCase", "größe_in_m"]
    assert named("json.JSONDecoder of Ronald McDonald") == ["json.JSONDecoder", "Ronald McDonald"]


def test_spans_are_sorted_and_do_not_overlap():
    text = "in New YorkCity.harbour or New York" * 3
    found = spans.names(text)
    assert found == sorted(found)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(found))


def test_the_last_token_holds_the_last_character(tokenizer):
    """Byte-level pieces of one character share its offsets; the last of them is it."""
    text = "so Diana 记忆, é Di"
    encoding = tokenizer.encode(text)
    offsets_N2 = np.array(encoding.offsets)
    chosen = [text.index(word) for word in ("Diana", "记忆", "é")]
    found = spans.tokens_of([(chosen[0], chosen[0] + 5), (chosen[1], chosen[1] + 2),
                             (chosen[2], chosen[2] + 1), (len(text) - 2, len(text))], offsets_N2)
    pieces = [encoding.tokens[first : last + 1] for first, last in found.tolist()]
    assert pieces[0] == ["ĠDi", "a", "na"]
    assert tokenizer.decode([tokenizer.token_to_id(piece) for piece in pieces[1]]) == "记忆"
    assert len(pieces[1]) == 6
    assert len(pieces[2]) == 2
    assert pieces[3] == ["ĠDi"], "the space before is in the token"


def test_tokens_that_are_nothing_of_the_text():
    offsets_N2 = np.array([(0, 0), (0, 2), (2, 4), (6, 8), (0, 0)])
    assert spans.tokens_of([(0, 3), (4, 6), (6, 8)], offsets_N2).tolist() == [[1, 2], [3, 3]]
    assert spans.tokens_of([], offsets_N2).shape == (0, 2)


# --- Files ---


def test_a_file_of_spans():
    content = "# start end\n\n5 9\n0\t4  # the first\n"
    assert not spans.is_few_nerd(content)
    assert spans.listed(content, 9) == ("spans of a file", [(0, 4), (5, 9)])


@pytest.mark.parametrize(
    "line", ["0 10", "4 4", "5 2", "-1 3", "a 3", "3", "1 2 3", "1.0 2", "² 3"])
def test_what_is_no_span(line):
    with pytest.raises(UserError) as error:
        spans.listed(f"# a comment\n{line}\n", 9)
    assert str(error.value) == (f"spans line 2 = {line!r}: must be `start end` with 0 <= start < "
                                "end <= 9, the text's length")


NERD = ("\nPaul\tperson-actor\nNewman\tperson-actor\n#\tO\n1\tO\nin\tO\nŁódź\tlocation-GPE\n"
        "Anna\tperson-other\n\n\nAnna\tperson-other\r\nlaughs\tO\n")


def test_few_nerd_brings_its_own_text():
    assert spans.is_few_nerd(NERD)
    text, marked = spans.few_nerd(NERD)
    assert text == "Paul Newman # 1 in Łódź Anna\nAnna laughs"
    assert [text[start:end] for start, end in marked.spans] == [
        "Paul Newman", "Łódź", "Anna", "Anna"]
    assert marked.kind == "entities of a Few-NERD file"


@pytest.mark.parametrize("line", ["word", "word\t", "\tO", "a\tO\tO", "1\t5"])
def test_what_is_not_few_nerd(line):
    with pytest.raises(UserError, match=r"spans line 2 = .*: must be a word, a tab and its tag"):
        spans.few_nerd(f"a\tO\n{line}\n")
