"""LongPPL against a model whose losses are known, and a rewrite of the definition."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.errors import UserError
from engram_jax.evaluation.longppl import (
    KeyTokens,
    by_position,
    key_tokens,
    perplexities,
    spans_of,
    tokens_of,
)


def copying(tokens_T):
    """A model that knows a token if it has read it before: 0.5 nats, and 4 otherwise."""
    seen, losses = set(), []
    for token in tokens_T.tolist():
        losses.append(0.5 if token in seen else 4.0)
        seen.add(token)
    return np.array(losses)


def test_a_token_is_key_where_only_the_whole_text_knows_it():
    tokens = np.arange(100, dtype=np.int32)
    tokens[90] = 3  # read long ago
    tokens[91] = 89  # read a moment ago
    rule = KeyTokens(window=16, slide=4)
    assert key_tokens(copying, tokens, rule).tolist() == [90]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=80), st.integers(1, 20), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_key_tokens_are_those_of_the_definition(tokens, window, slide):
    tokens = np.array(tokens, np.int32)
    expected = []
    for t in range(window, len(tokens)):
        start = (t - window) // slide * slide
        whole, short = copying(tokens[:t + 1])[-1], copying(tokens[start:t + 1])[-1]
        if short - whole > 2 and whole < 2:
            expected.append(t)
    assert key_tokens(copying, tokens, KeyTokens(window=window, slide=slide)).tolist() == expected


def test_perplexities_are_exponents_of_means():
    tokens = np.array([1, 2, 1, 3, 1], np.int32)  # losses 4, 4, 0.5, 4, 0.5
    found = perplexities(copying, [(tokens, np.array([2, 3])), (tokens[:2], np.array([], int))])
    assert found.long == pytest.approx(math.exp((0.5 + 4) / 2))
    assert found.plain == pytest.approx(math.exp((4 + 0.5 + 4 + 0.5 + 4) / 5))
    assert (found.key_tokens, found.tokens) == (2, 5)
    assert perplexities(copying, [(tokens, np.array([], int))]).long is None


def test_spans_of_one_tokenizer_are_tokens_of_another():
    words = [(0, 3), (3, 7), (7, 9), (9, 12)]  # "The cat  sat"
    assert spans_of(np.array([1, 2]), words) == [(3, 9)]
    letters = [(at, at + 1) for at in range(12)]
    assert tokens_of([(3, 9)], letters).tolist() == [3, 4, 5, 6, 7, 8]
    assert tokens_of([(0, 3), (9, 12)], words).tolist() == [3]  # the first is predicted by nothing
    assert tokens_of(spans_of(np.array([1, 3]), words), words).tolist() == [1, 3]


def test_perplexity_by_position():
    losses = np.log(np.array([[9, 2, 2, 8], [9, 2, 2, 8]], float))
    assert by_position(losses, [1, 3, 4]) == pytest.approx([2, 8])
    for edges in ([1], [0, 3], [3, 1], [1, 5]):
        with pytest.raises(UserError, match="edges"):
            by_position(losses, edges)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"longppl\.window = 0: must be at least 1"):
        key_tokens(copying, np.arange(5), KeyTokens(window=0))
    with pytest.raises(UserError, match="at least two tokens"):
        perplexities(copying, [(np.arange(1), np.array([], int))])
