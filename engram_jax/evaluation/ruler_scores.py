"""What a trained run answers to RULER's questions."""

from collections.abc import Sequence
from typing import NamedTuple

from engram_jax.config import require
from engram_jax.evaluation import ruler
from engram_jax.evaluation.haystack import Source
from engram_jax.inference.engine import Request
from engram_jax.inference.serving import Served
from engram_jax.results import scores


class Score(NamedTuple):
    """task, length, how many samples there were, and score, their mean in 0..100."""

    task: str
    length: int
    samples: int
    score: float


def measured(
    model: Served, source: Source, lengths: Sequence[int], tasks: Sequence[str] = (),
    samples: int = 50, seed: int = 0, slots: int = 8,
) -> list[Score]:
    """A run's score on every task at every length.

    Args:
      model: the run; its answers are greedy.
      source: text and tokenizer of the questions.
      lengths: in tokens, prompt and answer together.
      tasks: names of `ruler.TASKS`; none is all.
      samples: questions of each task and length.
      seed: of the questions.
      slots: sequences at once.

    Raises:
      UserError: a length beyond the one that the run was trained at or extended to, or as
        `ruler.samples`.
    """
    require(samples >= 1, "limit", samples, "must be at least 1")
    for length in lengths:
        require(length <= model.length, "ruler", length,
                f"is beyond the {model.length} tokens that the run was trained at or extended to")
    out = []
    for length in lengths:
        engine = model.engine(slots=slots, length=length)
        for task in tasks or ruler.TASKS:
            asked = list(ruler.samples(source, task, length, samples, seed))
            made = engine.generate([Request(
                prompt=tuple(source.tokenizer.encode(
                    one.prompt + one.prefix, add_special_tokens=False).ids),
                tokens=one.answer_tokens) for one in asked])
            points = [ruler.score(one, source.tokenizer.decode(ids))
                      for one, ids in zip(asked, made, strict=True)]
            out.append(Score(task, length, len(points), 100 * sum(points) / len(points)))
    return out


def kept(answers: Sequence[Score], step: int, seed: int, text: str) -> list[scores.Score]:
    """What scores.json keeps: the tasks, and the paper's columns whose tasks are all there."""
    by_task = {(one.task, one.length): one for one in answers}
    out = []
    for length in dict.fromkeys(one.length for one in answers):
        values = {task: one.score for (task, of), one in by_task.items() if of == length}
        values |= {column: sum(values[part] for part in parts) / len(parts)
                   for column, parts in ruler.COLUMNS.items()
                   if len(parts) > 1 and set(parts) <= set(values)}
        count = next(one.samples for one in answers if one.length == length)
        settings = {"length": length, "samples": count, "seed": seed, "text": text}
        out += [scores.Score(of="ruler", task=task, metric="", step=step, value=value,
                             settings=settings) for task, value in values.items()]
    return out


def described(answers: Sequence[Score]) -> str:
    """Tasks and the paper's columns as rows, lengths as columns."""
    lengths = sorted({score.length for score in answers})
    by_task = {(score.task, score.length): score.score for score in answers}
    tasks = list(dict.fromkeys(score.task for score in answers))
    rows = [(task, [by_task[task, length] for length in lengths]) for task in tasks]
    for column, parts in ruler.COLUMNS.items():
        if set(parts) <= set(tasks):
            rows.append((f"mean of {column}" if len(parts) > 1 else column, [
                sum(by_task[part, length] for part in parts) / len(parts) for length in lengths]))
    width = max(len(name) for name, _ in rows) + 2
    lines = [" " * width + "".join(f"{length:>9,}" for length in lengths)]
    return "\n".join(lines + [f"{name:<{width}}" + "".join(f"{value:>9.1f}" for value in values)
                              for name, values in rows])
