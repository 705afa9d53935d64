"""The rows that a run logs: appended to metrics.jsonl on a disk, in parts in object storage.

Object storage cannot append, so there rows gather in memory and go out now and then, and whenever
`flush` says so, into metrics-00000.jsonl. That file is written anew until it has PART_CHARACTERS;
then comes metrics-00001.jsonl.

A row is JSON: numbers of a step that are not finite are left out of it, and named in its
`not_finite`.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from engram_jax.errors import MachineError, UserError
from engram_jax.settings import json_text
from engram_jax.storage import is_local, keep, refusals, write_text

PART_CHARACTERS = 2**20
SECONDS_BETWEEN_WRITES = 30.0

Row = Mapping[str, Any]


class Metrics:
    """The rows of the run in `directory`; one process at a time writes them."""

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._local = is_local(directory)
        self._part = 0
        self._lines: list[str] = []  # of the part that is being filled
        self._waiting = False
        self._written = float("-inf")

    def rows(self) -> list[dict[str, Any]]:
        """All that was logged, without a last line that was cut off.

        Raises:
          UserError: a line before the last one is damaged.
        """
        self.flush()
        try:
            return [row for place in self._places() for row in _rows(place)]
        except MachineError as error:
            if self._local or not isinstance(error.__cause__, FileNotFoundError):
                raise
        # A start that went back has removed a part between the list and the reading.
        return [row for place in self._places() for row in _rows(place)]

    def log(self, row: Row) -> None:
        """Add one row.

        Raises:
          MachineError: it cannot be written.
        """
        if self._local:
            place = self._directory / "metrics.jsonl"
            with refusals(place, "written"), place.open("a") as file:
                file.write(_line(row))
            self._waiting = True
            return
        self._lines.append(_line(row))
        self._waiting = True
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Wait until everything that was logged would survive a kill.

        Raises:
          MachineError: it cannot be written.
        """
        if not self._waiting:
            return
        self._waiting = False
        if self._local:
            with refusals(self._directory, "written"):
                keep(self._directory / "metrics.jsonl")
            return
        write_text(self._place(self._part), "".join(self._lines))
        self._written = time.monotonic()
        if sum(map(len, self._lines)) >= PART_CHARACTERS:
            self._part, self._lines = self._part + 1, []

    def truncate(self, last_step: int) -> None:
        """Forget what was logged after `last_step`, and any half-written line.

        A kill on the way leaves rows after `last_step`, never a gap before it.
        """
        self._part, self._lines, self._waiting = 0, [], False
        for place in reversed(self._places()):
            rows = _rows(place)
            lines = [_line(row) for row in rows if row["step"] <= last_step]
            if len(lines) < len(rows) or self._local:
                self._replace(place, lines)
            if lines:
                break
        else:
            return
        if not self._local:
            self._part, self._lines = self._places().index(place), lines

    def _replace(self, place: epath.Path, lines: Sequence[str]) -> None:
        if lines or self._local:
            write_text(place, "".join(lines))
        else:
            with refusals(place, "removed"):
                place.unlink()

    def _places(self) -> list[epath.Path]:
        """The files that there are, in order."""
        if self._local:
            place = self._directory / "metrics.jsonl"
            return [place] if place.exists() else []
        with refusals(self._directory, "read"):
            if not self._directory.exists():
                return []
            return sorted(place for place in self._directory.iterdir()
                          if place.name.startswith("metrics-"))

    def _place(self, part: int) -> epath.Path:
        return self._directory / f"metrics-{part:05d}.jsonl"


def _line(row: Row) -> str:
    lost = [name for name, value in row.items()
            if isinstance(value, float) and not math.isfinite(value)]
    kept = {name: value for name, value in row.items() if name not in lost}
    return json_text({**kept, "not_finite": lost} if lost else kept) + "\n"


def _rows(place: epath.Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with refusals(place, "read"):
        lines = place.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and type(row.get("step")) is int):
                raise ValueError("no step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # cut off by a kill
                break
            raise UserError(f"{place}: line {number} is damaged ({error})") from error
        rows.append(row)
    return rows
