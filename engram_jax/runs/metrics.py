"""The rows that a run logs: appended to metrics.jsonl on a disk, in parts in object storage.

Object storage cannot append, so there rows gather in memory and go out now and then, and whenever
`flush` says so, into metrics-00000.jsonl. That file is written anew until it has PART_CHARACTERS;
then comes metrics-00001.jsonl.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from engram_jax.storage import is_local, refusals, write_text

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
        """All that was logged; a line that was cut off ends it."""
        self.flush()
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
            return
        self._lines.append(_line(row))
        self._waiting = True
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Until everything that was logged would survive a kill.

        Raises:
          MachineError: it cannot be written.
        """
        if not self._waiting:
            return
        write_text(self._place(self._part), "".join(self._lines))
        self._waiting, self._written = False, time.monotonic()
        if sum(map(len, self._lines)) >= PART_CHARACTERS:
            self._part, self._lines = self._part + 1, []

    def truncate(self, last_step: int) -> None:
        """Forget what was logged after `last_step`, and any half-written line.

        A kill on the way leaves rows after `last_step`, never a gap before it.
        """
        self._part, self._lines, self._waiting = 0, [], False
        for place in reversed(self._places()):
            found = _rows(place)
            lines = [_line(row) for row in found if row["step"] <= last_step]
            if len(lines) < len(found) or self._local:
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
    return json.dumps(row) + "\n"


def _rows(place: epath.Path) -> list[dict[str, Any]]:
    rows = []
    with refusals(place, "read"):
        text = place.read_text()
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
