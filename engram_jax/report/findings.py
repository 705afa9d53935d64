"""What a page is about: arms of runs, one opened run of each, a text, and findings in them."""

import dataclasses
from collections.abc import Container, Sequence
from typing import Any

from etils import epath

from engram_jax.config import require
from engram_jax.data.reading import read_file
from engram_jax.errors import UserError
from engram_jax.insides import analyses
from engram_jax.insides.observing import Opened, open_run
from engram_jax.insides.texts import validation_text
from engram_jax.report.looks import Look, looks, memory_kind, slots
from engram_jax.results import comparing
from engram_jax.results.comparing import Arm
from engram_jax.runs.directory import RunDirectory

# Of the text, batches that an analysis is given where fewer than `analyses.BATCHES` show the same.
ENOUGH = {"lens": 2, "gates": 4, "suppression": 4}
BY_NGRAM = ("gates", "memory", "patchscope")  # say nothing of rows that n-grams did not choose
OF_MEMORY = ("suppression", "memory")
PROMPT_TOKENS = 24  # of the text whose last token's state PatchScope reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """An arm, how it is drawn, and its first finished run (or its first with a checkpoint), opened;
    None while it has no checkpoint."""

    arm: Arm
    look: Look
    opened: Opened | None

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def keys(self) -> str:
        """What points at the rows of its memory; "" without one."""
        model = self.arm.runs[0].config.model
        memory = model.engram or model.over_encoding
        return memory.keys if memory else ""


@dataclasses.dataclass(frozen=True)
class Findings:
    """Findings of one analysis by arm, and by reason the arms that have none."""

    values: dict[str, Any]
    reasons: dict[str, list[str]]

    @property
    def missing(self) -> list[str]:
        """A line a reason."""
        return [f"{', '.join(names)}: {reason}" for reason, names in self.reasons.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """All that a page is made from.

    Attributes:
      subjects: of every arm, the one that others are measured against first.
      text: that the opened runs read; "" if there is none.
      no_text: why there is none.
    """

    subjects: Sequence[Subject]
    text: str
    no_text: str = ""

    @property
    def arms(self) -> list[Arm]:
        return [subject.arm for subject in self.subjects]

    def of(self, what: str, subjects: Sequence[Subject] | None = None) -> Findings:
        """The findings of `analyses.ANALYSES[what]` in each arm's opened run, or some arms'."""
        values: dict[str, Any] = {}
        reasons: dict[str, list[str]] = {}
        for subject in self.subjects if subjects is None else subjects:
            try:
                values[subject.name] = self._of(what, subject)
            except UserError as error:
                name = subject.opened.name if subject.opened else ""
                reason = str(error).removeprefix(f"run = {name!r}: ")
                reasons.setdefault(reason, []).append(subject.name)
        return Findings(values, reasons)

    def largest(self, names: Container[str] | None = None) -> Subject:
        """The arm with the largest memory, of all or of those named; the first of equals."""
        chosen = [subject for subject in self.subjects if names is None or subject.name in names]
        return max(chosen, key=lambda subject: subject.arm.numbers.engram_params)

    def pair(self, first: Subject, other: Subject) -> Any:
        """CKA of two arms' runs, the soft alignment, and the positions that were compared.

        Raises:
          UserError: they have other tokenizers, or there is no text.
        """
        self._require_text()
        ours, theirs = _require_opened(first), _require_opened(other)
        likeness = analyses.ANALYSES["cka"]([ours, theirs], self.text)
        return {**likeness, **likeness["with"][theirs.name]}

    def _of(self, what: str, subject: Subject) -> Any:
        opened = _require_opened(subject)
        if what != "tokenizer":
            self._require_text()
        if what in OF_MEMORY and not subject.keys:
            raise UserError("has no memory")
        if what in BY_NGRAM and subject.keys not in ("", "ngrams"):
            raise UserError(f"its rows are chosen by {subject.keys!r} keys, a control, so what a "
                            "token reads says nothing of its n-gram")
        text = self.prompt(opened) if what == "patchscope" else _beginning(
            opened, self.text, ENOUGH.get(what, 0))
        return analyses.ANALYSES[what]([opened], text)[opened.name]

    def _require_text(self) -> None:
        if not self.text:
            raise UserError(self.no_text)

    def prompt(self, opened: Opened) -> str:
        """The text whose last token PatchScope asks about."""
        ends = opened.encoded(self.text[:1000]).offsets[:PROMPT_TOKENS]
        return self.text[: ends[-1][1]] if ends else ""


def _require_opened(subject: Subject) -> Opened:
    if subject.opened is None:
        raise UserError("has no checkpoint yet")
    return subject.opened


def _beginning(opened: Opened, text: str, batches: int) -> str:
    """So many batches of a text as a run reads it; 0 is all."""
    data = opened.run.data
    count = batches * data.batch_size * (data.sequence_length + 1)
    ends = opened.encoded(text).offsets if count else []
    return text[: ends[count - 1][1]] if count and len(ends) > count else text


def material(
    directories: Sequence[epath.PathLike], file: epath.PathLike | None = None,
    mesh: str | None = None,
) -> Material:
    """The arms of all runs in `directories`, opened.

    Args:
      directories: as `comparing.arms` takes them; where the first is a run itself, they keep their
        order.
      file: the text that is read, UTF-8; None is the first run's validation text.
      mesh: of each run, as `serving_mesh` takes it.

    Raises:
      UserError: no run, a run without a checkpoint, or no such file; or as `serving_mesh`.
      MachineError: something cannot be read.
    """
    arms = comparing.arms(directories)
    if not (epath.Path(directories[0]).expanduser() / "config.json").exists():
        arms = _in_order(arms)
    subjects = [Subject(arm=arm, look=look, opened=_opened(arm, mesh))
                for arm, look in zip(arms, looks(arms), strict=True)]
    first = next((subject.opened for subject in subjects if subject.opened), None)
    if first is None:
        # Which says why it cannot be opened.
        first = open_run(RunDirectory(arms[0].runs[0].path), mesh)
    if file is not None:
        text = read_file(file, "text")
        require(bool(text), "text", str(file), "is empty")
        return Material(subjects=subjects, text=text)
    try:
        text = validation_text(first)
        return Material(subjects=subjects, text=text, no_text="its validation text is empty")
    except UserError as error:  # the text has moved since; the records are still worth a page
        return Material(subjects=subjects, text="", no_text=f"its text cannot be read ({error}); "
                        "name one with --text FILE")


def _in_order(arms: Sequence[Arm]) -> list[Arm]:
    """The arms in the order of the page: without memory first, then by kind and size."""
    kinds = ["no memory", *(memory_kind(arm.runs[0].config) for arm in arms)]
    return sorted(arms, key=lambda arm: (kinds.index(memory_kind(arm.runs[0].config)),
                                         slots(arm.runs[0].config)))


def _opened(arm: Arm, mesh: str | None) -> Opened | None:
    """The first finished run, or else the first with a checkpoint."""
    for run in sorted(arm.runs, key=lambda run: run.result is None):
        try:
            return open_run(RunDirectory(run.path), mesh)
        except UserError:
            if run.result is not None:
                raise
    return None
