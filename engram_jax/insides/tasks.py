"""Answers to prompts, with memory and without: which tasks need what memory holds.

Shapes: B batch, T time, N examples, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.data.reading import Unreadable, json_value
from engram_jax.errors import UserError
from engram_jax.insides.observing import Opened
from engram_jax.insides.suppression import Kept
from engram_jax.model.loss import cross_entropy

FIELDS = ("task", "prompt", "answer")
SHOWN = 60  # characters of a line that an error quotes


class Example(NamedTuple):
    """One line of a file of tasks.

    Attributes:
      task: its name; examples with one name are told together.
      prompt, answer: the answer follows the prompt as they stand, with no space added.
      line: of the file, from 1 on.
    """

    task: str
    prompt: str
    answer: str
    line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered(Kept):
    """The answers of one task; tokens and losses are those of all its answers.

    Attributes:
      examples: how many answers there are.
      right, right_suppressed: the share of answers whose every token is the likeliest after the
        true ones before it, with memory and without.
    """

    examples: int
    right: float
    right_suppressed: float


def parsed(content: str) -> list[Example]:
    """The examples of a file of JSON lines with "task", "prompt" and "answer"; others are left.

    Raises:
      UserError: no example, or a line of another form; it names the line.
    """
    examples = [_example(line, number) for number, line in enumerate(content.split("\n"), 1)
             if line.strip()]
    require(bool(examples), "tasks", content[:SHOWN], "must have a line of JSON for each example")
    return examples


def _example(line: str, number: int) -> Example:
    where, shown = f"tasks line {number}", line.strip()[:SHOWN]
    try:
        values = json_value(line)
    except Unreadable as error:
        raise UserError(f"{where} = {shown!r}: {error}") from error
    require(isinstance(values, dict), where, shown, f"must be an object with {', '.join(FIELDS)}")
    for field in FIELDS:
        require(isinstance(values.get(field), str), where, shown, f"needs a text {field!r}")
    require(bool(values["answer"]), where, shown, "must have an answer that is not empty")
    return Example(values["task"], values["prompt"], values["answer"], number)


def answered(opened: Opened, examples: Sequence[Example]) -> dict[str, Answered]:
    """Losses and right answers with memory and without, by task in the order of the examples.

    Raises:
      UserError: an example whose prompt has no token before the answer, or that is longer than a
        sequence of the run.
    """
    cut = [_tokens(opened, example) for example in examples]
    scores, without = (_scores(opened, cut, scale) for scale in (1.0, 0.0))
    answers = {}
    for task in dict.fromkeys(example.task for example in examples):
        own = [number for number, example in enumerate(examples) if example.task == task]
        (loss, right), (suppressed, still) = (
            _told([of_each[number] for number in own]) for of_each in (scores, without))
        answers[task] = Answered(
            tokens=sum(len(scores[number].loss_T) for number in own), loss=loss,
            suppressed=suppressed, examples=len(own), right=right, right_suppressed=still)
    return answers


class _Cut(NamedTuple):
    """An example's tokens, int32 [T], and the first of its answer's."""

    tokens_T: np.ndarray
    first: int


def _tokens(opened: Opened, example: Example) -> _Cut:
    """Prompt and answer cut together, as in a text: a token that ends in the answer is its own."""
    encoding = opened.encoded(example.prompt + example.answer)
    tokens_T = np.array(encoding.ids, np.int32)
    inner_T = np.array([end > len(example.prompt) for _, end in encoding.offsets], bool)
    where, first = f"tasks line {example.line}", int(inner_T.argmax()) if inner_T.any() else -1
    require(first >= 0, where, example.answer[:SHOWN], "the answer has no token")
    require(first > 0, where, example.prompt[:SHOWN],
            "the prompt must have a token before the answer's first")
    most = opened.run.data.sequence_length + 1
    require(len(tokens_T) <= most, where, f"{len(tokens_T)} tokens",
            f"must be at most {most} for {opened.name}, a sequence and its last target")
    return _Cut(tokens_T, first)


class _Score(NamedTuple):
    """The score of an answer's tokens: nats float32 [T], and which are the likeliest, bool [T]."""

    loss_T: np.ndarray
    right_T: np.ndarray


def _scores(opened: Opened, cut: Sequence[_Cut], scale: float) -> list[_Score]:
    scores = []
    for chosen, tokens in _batches(opened, cut):
        logits_BTV = opened.head(opened.observe(tokens[:, :-1], scale).streams[-1])
        loss_BT = np.asarray(cross_entropy(logits_BTV, jnp.asarray(tokens[:, 1:])))
        likeliest_BT = np.asarray(logits_BTV[..., : opened.reader.vocab_size].argmax(axis=-1))
        for each, loss_T, right_T in zip(
                chosen, loss_BT, likeliest_BT == tokens[:, 1:], strict=False):
            own = slice(each.first - 1, len(each.tokens_T) - 1)
            scores.append(_Score(loss_T[own], right_T[own]))
    return scores


def _batches(
    opened: Opened, cut: Sequence[_Cut]
) -> Iterator[tuple[Sequence[_Cut], np.ndarray]]:
    """Examples and their tokens, padded on the right to one shape [B, T + 1], compiled once."""
    size = min(opened.run.data.batch_size, len(cut))
    longest = max(len(each.tokens_T) for each in cut)
    for start in range(0, len(cut), size):
        chosen = cut[start : start + size]
        tokens = np.full((size, longest), opened.reader.pad_id, np.int32)
        for row, each in enumerate(chosen):
            tokens[row, : len(each.tokens_T)] = each.tokens_T
        yield chosen, tokens


def _told(scores: Sequence[_Score]) -> tuple[float, float]:
    """Mean loss of all tokens, and the share of answers that are right throughout."""
    return (float(np.concatenate([score.loss_T for score in scores]).mean()),
            float(np.mean([score.right_T.all() for score in scores])))
