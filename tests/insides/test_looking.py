"""Looking inside: the same network as in training, its gates, lenses, patches, and what is lost
without memory."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro, with_model, write_text
from tokenizers import Tokenizer, decoders, models

from engram_jax.errors import UserError
from engram_jax.insides import gates, suppression, tasks
from engram_jax.insides.logit_lens import divergence, logit_lens
from engram_jax.insides.observing import Opened, Patch, observe
from engram_jax.insides.patchscope import patchscope
from engram_jax.insides.token_classes import compression
from engram_jax.model import transformer
from engram_jax.runs.reader import open_inputs, open_reader
from engram_jax.training.state import init_state

pytestmark = pytest.mark.usefixtures("compilations")
TEXT = "kalo misu tera vipe nolo"
LETTERS = "kalo 记忆 über"


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


@pytest.mark.slow
def test_runs_that_differ_in_their_tables_alone_share_a_program(run, tokens, opened, batch):
    engram = dataclasses.replace(run.model.engram, rows_per_head=(96, 160), hash_seed=5)
    other = opened_run(with_model(run, engram=engram), tokens)
    seen, programs = opened.observe(batch), observe._cache_size()
    assert not np.array_equal(other.observe(batch).gates[0], seen.gates[0])
    assert observe._cache_size() == programs


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


@pytest.mark.slow
def test_a_long_text_is_read_in_sequences(opened):
    """As the model was trained, and no longer."""
    most = opened.run.data.sequence_length
    text = TEXT * (2 * most // len(opened.tokens(TEXT)) + 1)
    short, found = gates.of_texts(opened, [TEXT, text])
    tokens_T = opened.tokens(text)
    assert len(found.pieces) == len(tokens_T) > 2 * most
    assert len(short.pieces) == len(opened.tokens(TEXT))
    part_T = tokens_T[most : 2 * most]
    expected = logits(opened, part_T[None])[1].gates
    for layer in (0, 2):
        assert found.gates[layer].shape == (len(tokens_T), 2)
        np.testing.assert_allclose(found.gates[layer][most : 2 * most], expected[layer][0], rtol=0,
                                   atol=1e-5)


def test_pieces_wait_for_whole_characters(opened):
    """Letters that the tokenizer knows only as bytes."""
    found = gates.of_text(opened, LETTERS).pieces
    assert "".join(found) == LETTERS
    assert "" in found
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@pytest.mark.slow
def test_gates_of_texts_in_one_pass_are_those_of_each(opened):
    """What pads the shorter one comes after it."""
    texts = [TEXT, LETTERS]
    for text, found in zip(texts, gates.of_texts(opened, texts), strict=True):
        alone = gates.of_text(opened, text)
        assert found.pieces == alone.pieces
        for layer in (0, 2):
            np.testing.assert_allclose(found.gates[layer], alone.gates[layer], rtol=0, atol=1e-5)


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
    made[..., 0] = 0.3
    assert gates.pattern_branch(opened, [batch], layer=2)[0] == 0, "it follows nothing"


def test_what_has_no_memory_has_no_gates(bare, opened, batch):
    ungated = dataclasses.replace(opened.run.model.engram, gated=False)
    open_all = dataclasses.replace(opened, run=with_model(opened.run, engram=ungated))
    with pytest.raises(UserError, match=r"run = 'micro': has an Engram without a gate"):
        gates.of_text(open_all, TEXT)
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
    found = suppression.measured(opened, [batch[:2], batch[2:]]).by_kind(kinds)
    assert sum(kept.tokens for kept in found.values()) == 4 * 23
    assert any(abs(kept.loss - kept.suppressed) > 1e-3 for kept in found.values())
    for kept in suppression.measured(bare, [batch]).by_kind(kinds).values():
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


def test_a_word_may_begin_with_sentencepieces_space():
    tokenizer = Tokenizer(models.Unigram([("\u2581the", -1.0), ("the", -2.0), ("\u2581", -3.0)]))
    tokenizer.decoder = decoders.Metaspace()
    reader = SimpleNamespace(tokenizer=tokenizer, vocab_size=3)
    kind = suppression.token_classes(SimpleNamespace(reader=reader))
    assert kind(np.array([[0, 0, 1, 2]])).tolist() == [[
        "beginning of a word", "rest of a word", "space"]]


def test_bands_count_the_ngram_before_the_target():
    counts = suppression.ngram_counts(np.array([1, 2, 1, 2, 1, 2, 3]), 2)
    assert counts == {(1, 2): 3, (2, 1): 2, (2, 3): 1}
    kind = suppression.frequency_bands(counts, 2, bands=(0, 1, 3))
    names = kind(np.array([[1, 2, 1, 3, 9]]))  # asked before targets 2, 1, 3, 9: -,1 1,2 2,1 1,3
    assert [name.strip(" +") for name in names[0]] == [suppression.START, "3", "1", "0"]


def test_a_trigram_is_seen_once_it_stood_in_the_same_sequence():
    names = suppression.context(
        np.array([[1, 2, 3, 1, 2, 3, 3, 3, 3], [3, 1, 2, 4, 9, 1, 2, 3, 1]]))
    assert names.shape == (2, 8)
    seen = names == "seen in the context"
    assert [(b, t) for b, t in np.argwhere(seen).tolist()] == [(0, 4), (0, 7)]
    assert (names[~seen] == "new in the context").all()


# --- Tasks ---


def line(**fields):
    return json.dumps({"task": "recall", "prompt": "kalo misu", "answer": " te", **fields})


ASKED = [(" kalo misu", " tera vipe"), ("kalo", "misu"), ("nolo tera 记", "忆"), ("ka", " te no"),
         ("te", "ra")]


@pytest.fixture(scope="module")
def answers(opened):
    """Of five examples in two tasks, more than a batch."""
    lines = [line(task="recall" if i < 3 else "reading", prompt=prompt, answer=answer, more=i)
             for i, (prompt, answer) in enumerate(ASKED)]
    return tasks.answered(opened, tasks.parsed("\n".join(lines) + "\n\n"))


def test_answers_are_scored_as_one_by_one(opened, answers):
    assert list(answers) == ["recall", "reading"]
    for name, own in (("recall", ASKED[:3]), ("reading", ASKED[3:])):
        losses, right = [], []
        for prompt, answer in own:
            ids = opened.reader.tokenizer.encode(prompt + answer)
            first = next(i for i, (_, end) in enumerate(ids.offsets) if end > len(prompt))
            padded = np.zeros((4, 24), np.int32)  # the shape of `batch`, compiled before
            padded[0, : len(ids.ids)] = ids.ids
            log_p = np.asarray(jax.nn.log_softmax(logits(opened, padded)[0], axis=-1))[0]
            places = np.arange(first, len(ids.ids))
            losses += [-log_p[t - 1, ids.ids[t]] for t in places]
            size = opened.reader.vocab_size
            right.append(all(log_p[t - 1, :size].argmax() == ids.ids[t] for t in places))
        found = answers[name]
        assert (found.tokens, found.examples) == (len(losses), len(own))
        assert found.loss == pytest.approx(np.mean(losses), abs=1e-4)
        assert found.right == np.mean(right)
        assert abs(found.suppressed - found.loss) > 1e-3


def test_what_the_model_says_itself_is_right(opened):
    """An answer that greedy decoding gave is right with memory, one token changed is not."""
    prompt = "kalo misu"
    tokens = opened.tokens(prompt).tolist()
    padded = np.pad(np.tile(tokens, (4, 1)), ((0, 0), (0, 24 - len(tokens))))
    logits_V = logits(opened, padded)[0][0, len(tokens) - 1, : opened.reader.vocab_size]
    order = np.argsort(-np.asarray(logits_V)).tolist()
    texts = [opened.reader.tokenizer.decode([i]) for i in order]
    kept = [text for i, text in zip(order, texts, strict=True)
            if opened.tokens(prompt + text).tolist() == [*tokens, i]]
    own, other = kept[:2]
    assert own == texts[0], "the prompt and its likeliest token do not merge"
    asked = [("own", own), ("other", other), ("both", own), ("both", other)]
    lines = [line(task=task, prompt=prompt, answer=answer) for task, answer in asked]
    lines.append(line(task="longest", prompt=ASKED[0][0], answer=ASKED[0][1]))  # the same shape
    found = tasks.answered(opened, tasks.parsed("\n".join(lines)))
    assert [found[task].right for task in ("own", "other", "both")] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(("content", "said"), [
    ("", "tasks = '': must have a line of JSON for each example"),
    (f"{line()}\n{{task", "tasks line 2 = '{task': is not JSON: Expecting"),
    ("[1]", "tasks line 1 = '[1]': must be an object with task, prompt, answer"),
    (line(answer=3), "needs a text 'answer'"),
    (line(task=None), "needs a text 'task'"),
    (line(answer=""), "must have an answer that is not empty"),
    (line(prompt=""), "tasks line 1 = '': the prompt must have a token before the answer's first"),
    (line(answer="kalo " * 20), "tokens': must be at most 17 for micro, a sequence and its last"),
])
def test_what_is_no_task(opened, content, said):
    with pytest.raises(UserError) as error:
        tasks.answered(opened, tasks.parsed(content))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


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


@pytest.mark.slow
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
