"""Scores of trained runs, kept in the run's folder (scores.json)."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram_jax.config import require
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import json_text
from engram_jax.storage import one_after_another, read_json, refusals, write_text

FILE = "scores.json"
FIELDS = ("of", "task", "metric", "step", "value", "settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number.

    Attributes:
      of: what measured it: "harness" (lm-evaluation-harness), "ruler", "longppl" or "positions".
      task, metric: what was measured.
      step: of the run's checkpoint.
      value: the number, in the metric's own unit.
      settings: what it depends on beside: length, shots, limit, seed, text and so on.
    """

    of: str
    task: str
    metric: str
    step: int
    value: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tells it from the run's other scores of the same checkpoint, for tables."""
        length = self.settings.get("length")
        at = f"at {length:,}" if isinstance(length, int) else ""
        return " ".join(word for word in (self.task, self.metric, at) if word)

    @property
    def key(self) -> str:
        """Equal for two scores of which the later one takes the other's place."""
        return json_text([self.of, self.task, self.metric, self.step, self.settings],
                         sort_keys=True)


def scores_of(records: RunDirectory) -> list[Score]:
    """The scores that a run has, as they were written; none without the file.

    Raises:
      UserError: the file is damaged.
    """
    path = records.path / FILE
    with refusals(path, "read"):
        if not path.exists():
            return []
    listed: Any = read_json(path).get("scores")
    require(isinstance(listed, list), f"{path}: scores", type(listed).__name__, "must be a list")
    return [_parsed(str(path), each) for each in listed]


def _parsed(path: str, values: Any) -> Score:
    right = isinstance(values, dict) and set(values) == set(FIELDS) and isinstance(
        values["value"], int | float) and isinstance(values["step"], int) and isinstance(
        values["settings"], dict)
    require(right, f"{path}: scores", str(values)[:60],
            f"must be objects with {', '.join(FIELDS)}; remove the file to begin anew")
    return Score(**values)


def keep_scores(records: RunDirectory, scores: Iterable[Score]) -> None:
    """Add scores to those that a run has; those of the same question are replaced.

    What is no finite number is no score and is left out.

    Raises:
      UserError: the file there is damaged.
      MachineError: it cannot be written.
    """
    with one_after_another(records.path):
        kept = {score.key: score for score in [*scores_of(records), *scores]
                if math.isfinite(score.value)}
        values = {"scores": [{name: getattr(score, name) for name in FIELDS}
                             for score in kept.values()]}
        write_text(records.path / FILE, json_text(values, indent=1) + "\n")


def at_step(scores: Sequence[Score], step: int) -> dict[str, float]:
    """The values of one checkpoint by name, the latest of a name."""
    return {score.name: float(score.value) for score in scores if score.step == step}
