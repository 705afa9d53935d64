"""Looking inside: the same network as in training, its gates, lenses, patches, and what is lost
without memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro, with_model, write_text

from engram_jax.analysis import gates, suppression
from engram_jax.analysis.logit_lens import divergence, logit_lens
from engram_jax.analysis.observing import Opened, Patch
from engram_jax.analysis.patchscope import patchscope
from engram_jax.analysis.token_classes import compression
from engram_jax.errors import UserError
from engram_jax.model import transformer
from engram_jax.training.inputs import open_inputs, open_reader
from engram_jax.training.state import init_state

pytestmark = pytest.mark.usefixtures("compilations")
TEXT = "kalo misu tera vipe nolo"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three blocks, memory before the first and the third, two streams."""
    base = micro(write_text(tmp_path_factory.mktemp("looking") / "text.txt"))
    return with_model(base, depth=3, streams=2, engram=dataclasses.replace(
        base.model.engram, layers=(0, 2)))


@pytest.fixture(scope="module")
def tokens(run):
    return open_inputs(run).tokens


def opened_run(run, tokens):
    """The run before its training, with every number moved."""
    state = jax.jit(lambda: init_state(run))()
    leaves, structure = jax.tree.flatten(state.params)
    random = np.random.default_rng(0)
    params = structure.unflatten([leaf + 0.1 * random.standard_normal(leaf.shape).astype(np.float32)
                                  for leaf in leaves])
    tables = {name: jnp.asarray(random.standard_normal(table.shape), jnp.float32)
              for name, table in state.tables.items()}
    return Opened(run=run, reader=open_reader(run, tokens.tokenizer),
                  state=dataclasses.replace(state, params=params, tables=tables))


@pytest.fixture(scope="module")
def opened(run, tokens):
    return opened_run(run, tokens)


@pytest.fixture(scope="module")
def bare(run, tokens):
    return opened_run(with_model(run, engram=None), tokens)


@pytest.fixture(scope="module")
def batch(tokens):
    return tokens.train.read(0, 4 * 24).reshape(4, 24).astype(np.int32)


def logits(opened, tokens_BT):
    """(logits, what was observed), by `transformer.apply`."""
    tokens = jnp.asarray(tokens_BT)
    return apply(opened.state.params, tokens, opened.rows(tokens), opened.state.router_bias,
                 opened.run.model)


apply = jax.jit(transformer.apply, static_argnums=4)


def test_block_after_block_is_the_network(opened, batch):
    seen = opened.observe(batch)
    expected, other = logits(opened, batch)
    np.testing.assert_allclose(opened.head(seen.streams[-1]), expected, rtol=0, atol=1e-4)
    assert len(seen.streams) == 4
    assert sorted(seen.gates) == sorted(other.gates) == [0, 2]
    for layer, gate in other.gates.items():
        np.testing.assert_allclose(seen.gates[layer], gate, rtol=0, atol=1e-5)


def test_the_lens_ends_at_zero_and_agrees_with_float64(opened, batch):
    found = logit_lens(opened, [batch[:2], batch[2:]])
    assert found.shape == (3,)
    assert found[-1] == 0
    assert (found[:-1] > 0.01).all()
    first, *_, last = (np.asarray(opened.head(x), np.float64)
                       for x in opened.observe(batch).streams[1:])
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (last, first))
    assert found[0] == pytest.approx(np.sum(p * np.log(p / q), -1).mean(), rel=1e-4)
    assert float(jnp.abs(divergence(jnp.ones((1, 1, 5)), jnp.zeros((1, 1, 5)))).max()) < 1e-6


def test_gates_of_a_text_are_the_modules_own(opened):
    found = gates.of_text(opened, TEXT)
    assert "".join(found.pieces) == opened.reader.tokenizer.decode(opened.tokens(TEXT).tolist())
    expected = logits(opened, opened.tokens(TEXT)[None])[1].gates
    for layer in (0, 2):
        assert found.gates[layer].shape == (len(found.pieces), 2)
        np.testing.assert_allclose(found.gates[layer], expected[layer][0], rtol=0, atol=1e-5)


def test_pieces_wait_for_whole_characters(opened):
    """Letters that the tokenizer knows only as bytes."""
    text = "kalo 记忆 über"
    found = gates.of_text(opened, text).pieces
    assert "".join(found) == text
    assert "" in found
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


def test_extreme_ngrams_have_the_extreme_means(opened, batch):
    found = gates.extremes(opened, [batch], layer=2, order=2, count=3, least=2)
    means = [gate for _, gate, _ in found.highest]
    assert means == sorted(means, reverse=True)
    assert found.lowest[0][1] < found.highest[0][1]
    gate_BT = np.asarray(opened.observe(batch).gates[2]).mean(-1)
    text, mean, times = found.highest[0]
    same = [(b, t) for b, t in np.ndindex(4, 23) if opened.reader.tokenizer.decode(
        batch[b, t : t + 2].tolist()) == text]
    assert len(same) == times >= 2
    assert mean == pytest.approx(np.mean([gate_BT[b, t + 1] for b, t in same]), rel=1e-5)


def test_the_branch_that_follows_patterns_is_found(opened, batch, monkeypatch):
    """A branch whose gate is the probability itself has correlation 1."""
    seen = opened.observe(batch)
    chance = np.asarray(jax.nn.softmax(opened.head(seen.streams[-1])[:, :-1], axis=-1))
    sure = np.take_along_axis(chance, batch[:, 1:, None], axis=2)[..., 0]
    made = np.random.default_rng(0).random((*batch.shape, 2))
    made[:, 1:, 1] = 0.5 * sure + 0.1
    monkeypatch.setattr(Opened, "observe", lambda *_: seen._replace(gates={2: made}))
    found = gates.pattern_branch(opened, [batch], layer=2)
    assert found[1] == pytest.approx(1)
    assert abs(found[0]) < 0.5


def test_what_has_no_memory_has_no_gates(bare, opened, batch):
    for call in (lambda: gates.of_text(bare, TEXT), lambda: gates.extremes(bare, [batch], 0),
                 lambda: gates.pattern_branch(bare, [batch], 0)):
        with pytest.raises(UserError, match=r"run = 'micro': has no Engram"):
            call()
    with pytest.raises(UserError, match=r"layer = 1: must be one of \(0, 2\)"):
        gates.extremes(opened, [batch], layer=1)
    with pytest.raises(UserError, match="text = '': has no token"):
        gates.of_text(opened, "")


# --- Suppression ---


def test_suppression_takes_memory_away_and_nothing_else(opened, bare, batch):
    kinds = suppression.token_classes(opened)
    found = suppression.suppression(opened, [batch[:2], batch[2:]], kinds)
    assert sum(kept.tokens for kept in found.values()) == 4 * 23
    assert any(abs(kept.loss - kept.suppressed) > 1e-3 for kept in found.values())
    for kept in suppression.suppression(bare, [batch], kinds).values():
        assert kept.loss == kept.suppressed
        assert kept.likelihood_kept == 1


def test_losses_are_those_of_the_network(opened, batch):
    found = suppression.token_losses(opened, batch)
    log_p = jax.nn.log_softmax(logits(opened, batch[:, :-1])[0], axis=-1)
    expected = -np.take_along_axis(np.asarray(log_p), batch[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    zero = {name: jnp.zeros_like(table) for name, table in opened.state.tables.items()}
    emptied = dataclasses.replace(
        opened, state=dataclasses.replace(opened.state, tables=zero))
    np.testing.assert_array_equal(suppression.token_losses(opened, batch, scale=0.0),
                                  suppression.token_losses(emptied, batch))


def test_kinds_of_tokens():
    for text, kind in ((" word", "beginning of a word"), ("word", "rest of a word"),
                       ("\n", "space"), ("12", "digits"), (" (", "punctuation"),
                       ("+=", "punctuation"), ("é", "rest of a word")):
        assert suppression._class(text) == kind


def test_bands_count_the_ngram_before_the_target():
    counts = suppression.ngram_counts(np.array([1, 2, 1, 2, 1, 2, 3]), 2)
    assert counts == {(1, 2): 3, (2, 1): 2, (2, 3): 1}
    kind = suppression.frequency_bands(counts, 2, bands=(0, 1, 3))
    names = kind(np.array([[1, 2, 1, 3, 9]]))  # asked before targets 2, 1, 3, 9: -,1 1,2 2,1 1,3
    assert [int(name.strip(" +")) for name in names[0]] == [0, 3, 1, 0]


# --- PatchScope ---


def test_a_patch_changes_its_position_and_what_comes_after(opened, batch):
    plain = opened.observe(batch)
    state = jnp.full_like(plain.streams[1][0, 0], 0.5)
    seen = opened.observe(batch, patch=Patch(state, 0, 7))
    np.testing.assert_array_equal(seen.streams[0], plain.streams[0])
    np.testing.assert_array_equal(seen.streams[1][:, 7], jnp.broadcast_to(state, (4, *state.shape)))
    for x, y in zip(seen.streams[1:], plain.streams[1:], strict=True):
        np.testing.assert_allclose(x[:, :7], y[:, :7], rtol=0, atol=1e-5)
    assert float(jnp.abs(seen.streams[-1][:, 8:] - plain.streams[-1][:, 8:]).max()) > 1e-3


def test_a_state_patched_into_its_own_place_changes_nothing(opened):
    """The prompt is the text and ends with the placeholder: each layer says what the model does."""
    text = "kalo misu tera"
    said = patchscope(opened, text, prompt=text, placeholder="tera", tokens=3)
    assert len(said) == 3
    tokens = np.pad(opened.tokens(text), (0, 3))
    for place in range(len(tokens) - 3, len(tokens)):
        logits_V = logits(opened, tokens[None])[0][0, place - 1, : opened.reader.vocab_size]
        tokens[place] = int(logits_V.argmax())
    assert said == [opened.reader.tokenizer.decode(tokens[-3:].tolist())] * 3


def test_a_prompt_without_its_placeholder(opened):
    with pytest.raises(UserError, match=r"placeholder = 'y': must be a part of the prompt 'a b'"):
        patchscope(opened, TEXT, prompt="a b", placeholder="y")
    with pytest.raises(UserError, match=r"text = '': has no token"):
        patchscope(opened, "")


# --- Tokenizer compression ---


def test_compression_counts_classes(opened):
    found = compression(opened.reader.tokenizer)
    assert found.raw == opened.reader.vocab_size
    assert found.canonical == sum(found.sizes.values())
    assert sum(size * times for size, times in found.sizes.items()) == found.raw
    assert found.reduction == 1 - found.canonical / found.raw > 0
    text, members, size = found.largest[0]
    assert size == max(found.sizes) == next(iter(found.sizes))
    assert all(member.strip().lower() == text.strip() for member in members if text.isascii())
