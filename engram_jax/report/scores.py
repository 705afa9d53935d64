"""The section of what the runs can do, as `engram-jax evaluate` kept it in their folders."""

import statistics
from collections.abc import Mapping, Sequence

from engram_jax.errors import UserError
from engram_jax.report.blocks import Cell, Section, Table
from engram_jax.report.findings import Material, Subject
from engram_jax.results.scores import Score, scores_of
from engram_jax.runs.directory import RunDirectory

TITLES = {
    "harness": "Tasks of lm-evaluation-harness", "ruler": "RULER (0 to 100)",
    "longppl": "LongPPL (perplexity on key tokens; lower is better)",
    "positions": "Perplexity by how many tokens were read before (lower is better)"}

Values = Mapping[str, Sequence[float]]  # name of a score -> its value in each run of an arm


def scores(material: Material) -> Section | None:
    """A table for each kind of score, a column an arm; None where no run has any."""
    by_arm: dict[str, dict[str, dict[str, list[float]]]] = {}
    missing = []
    for subject in material.subjects:
        try:
            by_arm[subject.name] = _of_arm(subject)
        except UserError as error:
            missing.append(f"{subject.name}: {error}")
    tables = [_table(material.subjects, title, {
        name: kinds[kind] for name, kinds in by_arm.items() if kind in kinds})
        for kind, title in TITLES.items() if any(kind in kinds for kinds in by_arm.values())]
    if not tables and not missing:
        return None
    return Section(
        name="scores", title="Scores", blocks=tables, missing=missing,
        reading="What engram-jax evaluate measured, of the last checkpoint that has scores; the "
        "mean over an arm's runs. Scores that were measured otherwise (another length, text, "
        "number of questions or shots) have lines of their own.")


def _of_arm(subject: Subject) -> dict[str, dict[str, list[float]]]:
    """kind -> name -> a value for each run."""
    kinds: dict[str, dict[str, list[float]]] = {}
    for run in subject.arm.runs:
        kept = scores_of(RunDirectory(run.path))
        last = max((score.step for score in kept), default=0)
        for score in kept:
            if score.step == last and score.of in TITLES:
                kinds.setdefault(score.of, {}).setdefault(_name(score), []).append(score.value)
    return kinds


def _name(score: Score) -> str:
    """The score's name, with the settings that tell it from others of the name."""
    beside = [f"{name} {value}" for name, value in score.settings.items()
              if name in ("shots", "limit", "evaluator") and value is not None]
    return f"{score.name} ({', '.join(beside)})" if beside else score.name


def _table(subjects: Sequence[Subject], title: str, by_arm: Mapping[str, Values]) -> Table:
    shown = [subject for subject in subjects if subject.name in by_arm]
    names = dict.fromkeys(name for values in by_arm.values() for name in values)
    rows: list[list[Cell | str]] = [
        [name, *(_cell(by_arm[subject.name].get(name, ())) for subject in shown)]
        for name in names]
    return Table(title=title, head=["score", *(f"#{subject.name}" for subject in shown)], rows=rows)


def _cell(values: Sequence[float]) -> Cell:
    if not values:
        return Cell("-")
    spread = f"{min(values):.4g} to {max(values):.4g}, {len(values)} runs"
    return Cell(f"{statistics.mean(values):.4g}", small=spread if len(values) > 1 else "")
