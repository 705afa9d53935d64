"""A run directory: what was run, on what, and what came out.

    config.json     the run, whole
    tokenizer.json  its tokenizer, in the format of HF `tokenizers`
    hash.json       what it hashes with (`hashing/artifact.py`)
    env.json        git revision, versions, devices, fingerprints of text and tokenizer at the first
                    start; `starts` has a line for each, with what was different then
    lock            who is training here (`lock.py`); gone when nobody is
    metrics.jsonl   one object for each logged step; in object storage in parts (`metrics.py`)
    checkpoints/    Orbax
    result.json     written last: its presence means that the run is done
    diverged.json   of a sweep's run that diverged: why it is not trained again
"""

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from tokenizers import Tokenizer

from engram_jax import __version__
from engram_jax.config import RunConfig, require
from engram_jax.data.tokenizer import parse_tokenizer
from engram_jax.distributed import is_first
from engram_jax.errors import UserError
from engram_jax.hashing import artifact
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.recipes import read_config
from engram_jax.runs.fingerprints import whole_digest
from engram_jax.runs.metrics import Metrics
from engram_jax.settings import first_difference, json_text, to_dict
from engram_jax.storage import (
    check_readable,
    is_local,
    read_json,
    refusals,
    scheme,
    write_text,
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


# What may be different when a run goes on: it changes no bit of what is trained.
NEUTRAL = ("training.log_every", "training.checkpoint_every", "training.evaluate_every",
           "training.keep_checkpoints", "training.tensorboard", "training.skips_in_a_row",
           "training.grace_seconds", "training.check_exchange", "data.cache_dir")


class RunDirectory:
    """Reads and writes the records of one run; `path` may be on a disk or gs://.

    Of several processes the first one writes; what the others write is dropped.

    Raises:
      UserError: object storage that cannot hold a run.
    """

    def __init__(self, path: epath.PathLike):
        check_readable(path, "out")
        if scheme(path) not in ("", "gs"):
            raise UserError(f"out = {os.fspath(path)!r}: Orbax keeps checkpoints on disks and "
                            "gs:// only; choose one of these, a mounted file system for example")
        place = epath.Path(path).expanduser()
        self.path = place.absolute() if is_local(place) else place  # orbax wants it whole
        self._metrics = Metrics(self.path)

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    @property
    def tokenizer_path(self) -> epath.Path:
        return self.path / "tokenizer.json"

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while the run is not done.

        Raises:
          UserError: it is damaged, or of a run that diverged.
        """
        path = self.path / "result.json"
        try:
            values = self._object("result.json")
            if values is not None:
                for field in ("loss", "bits_per_byte"):
                    require(isinstance(values.get(field), float | int), f"{path}: {field}",
                            values.get(field), "must be a number")
        except UserError as error:
            raise UserError(f"{error}; remove it, and the command that made the run evaluates its "
                            "last checkpoint again") from error
        return values

    def divergence(self) -> str:
        """Why a sweep gave this run up; "" where it did not."""
        return str((self._object("diverged.json") or {}).get("line", ""))

    def give_up(self, line: str) -> None:
        """Write diverged.json. `train` does not look at it."""
        self.flush()
        self._write("diverged.json", {"line": line})

    def config(self) -> RunConfig:
        """config.json.

        Raises:
          UserError: the folder does not hold a run.
        """
        place = self.path / "config.json"
        with refusals(place, "read"):
            if not place.exists():
                raise UserError(f"{self.path}: holds no run (there is no config.json)")
        return read_config(place)

    def env(self) -> dict[str, Any]:
        """env.json; empty where there is none.

        Raises:
          UserError: it is damaged.
        """
        env = self._object("env.json") or {}
        starts = env.get("starts", [])
        require(isinstance(starts, list) and all(isinstance(start, dict) for start in starts),
                f"{self.path / 'env.json'}: starts", starts, "must be a list of objects")
        return env

    def make(self) -> None:
        """Make the folder.

        Raises:
          UserError: it is no folder.
          MachineError: it cannot be made.
        """
        with refusals(self.path, "written"):
            try:
                if is_first():
                    self.path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise UserError(f"out = {str(self.path)!r}: is not a folder") from error

    def claim(self, run: RunConfig, env: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Record what is about to run, or check that it is what was recorded before.

        Args:
          run: the run.
          env: where it starts (`environment`).
          tokenizer: of the run; kept, so that the run can be read wherever it is taken.

        Raises:
          UserError: the folder holds another run, or one of another text or tokenizer.
          MachineError: the folder cannot be written.
        """
        with refusals(self.path, "read"):
            claimed = (self.path / "config.json").exists()
            read_before = self.tokenizer_path.exists()
        if claimed:
            self.check(run)
            self._check_text(run, env)
            if to_dict(self.config()) != to_dict(run):  # in what is neutral
                self._write("config.json", to_dict(run))
        if claimed and read_before:
            self._check_tokenizer(run, tokenizer)
        elif is_first():
            write_text(self.tokenizer_path, tokenizer.to_str())
        if not claimed:
            self._write("env.json", {**env, "starts": []})
            self._write("config.json", to_dict(run))  # last: with it the folder is claimed

    def begin(self, step: int, env: Mapping[str, Any]) -> None:
        """Add a start, at `step`, to env.json, with what is different from the first one."""
        first = self.env() or dict(env)
        starts = first.pop("starts", [{"step": 0}])  # version 0.1.0 kept none
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        other = {name: value for name, value in env.items() if first.get(name) != value}
        starts = [*starts, {"step": step, "time": now, **other}]
        self._write("env.json", {**first, "starts": starts})

    def tokenizer(self) -> Tokenizer:
        """tokenizer.json.

        Raises:
          UserError: it is not there or no tokenizer.
        """
        try:
            return parse_tokenizer(self.tokenizer_path.read_bytes().decode())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.tokenizer_path}: is missing or no tokenizer "
                            f"({error})") from error

    def artifact(self) -> HashArtifact | None:
        """hash.json; None where there is none: no memory, or an older version's run.

        Raises:
          UserError: it is no artifact, or a field of it is wrong.
        """
        path = self.path / artifact.FILE
        with refusals(path, "read"):
            there = path.exists()
        return artifact.read_artifact(path) if there else None

    def keep_artifact(self, kept: HashArtifact) -> None:
        """Write hash.json, unless it is there: a run never changes what it hashes with."""
        if is_first() and kept.memories and self.artifact() is None:
            with refusals(self.path, "written"):
                self.path.mkdir(parents=True, exist_ok=True)
            kept.write(self.path / artifact.FILE)

    def check(self, run: RunConfig) -> None:
        """Refuse a folder that holds another run (UserError); `NEUTRAL` settings may differ."""
        if difference := first_difference(_decisive(self.config()), _decisive(run)):
            field, before, now = difference
            raise UserError(
                f"{field} = {now!r}: {self.path} holds a run with {before!r}, and it changes what "
                "is trained; choose another folder, where training.start_from="
                f"{self.path} begins from this run")

    def source(self) -> Mapping[str, Any]:
        """What the first start recorded of the run that this one began from."""
        for start in self.env().get("starts", []):
            if isinstance(begun := start.get("start_from"), dict):
                return begun
        return {}

    def _check_text(self, run: RunConfig, env: Mapping[str, Any]) -> None:
        before = self.env() or env
        if before.get("data_fingerprint") != env.get("data_fingerprint"):
            raise UserError(f"data.path = {run.data.path!r}: is no longer the text that the run in "
                            f"{self.path} began with; choose another folder or delete this one")

    def _check_tokenizer(self, run: RunConfig, tokenizer: Tokenizer) -> None:
        if whole_digest(self.tokenizer()) != whole_digest(tokenizer):
            raise UserError(f"data.tokenizer = {run.data.tokenizer!r}: is no longer the tokenizer "
                            f"that the run in {self.path} began with (its tokenizer.json); choose "
                            "another folder or delete this one")

    def truncate_metrics(self, last_step: int) -> None:
        """Forget what was logged after `last_step`, and any half-written line."""
        if is_first():
            self._metrics.truncate(last_step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add one row to metrics.jsonl."""
        if is_first():
            self._metrics.log(row)

    def flush(self) -> None:
        """Wait until all logged rows would survive a kill: call it before a checkpoint is saved."""
        self._metrics.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a line that was cut off is left out."""
        return self._metrics.rows()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json: the run is done."""
        self.flush()
        self._write("result.json", result)

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        if is_first():
            write_text(self.path / name, json_text(values, indent=1, sort_keys=True) + "\n")

    def _object(self, name: str) -> dict[str, Any] | None:
        """What a file of JSON holds; None where there is none."""
        path = self.path / name
        with refusals(path, "read"):
            if not path.exists():
                return None
        return read_json(path)


def _decisive(run: RunConfig) -> dict[str, Any]:
    """The config without what is neutral."""
    values = to_dict(run)
    for path in NEUTRAL:
        part, _, name = path.partition(".")
        del values[part][name]
    return values


def environment(**known: Any) -> dict[str, Any]:
    """Where a run happens: code, versions, devices, and what else is `known`.

    `cpus` that this process may use: on CPU devices the order of sums, and so the last bits of a
    loss, depend on it.
    """
    return {
        "engram_jax": __version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "cpus": _cpus(),
        "command": sys.argv,
        **known,
    }


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def git_revision() -> str:
    """The checkout's commit, with "+changes" if it is not clean; "" outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(where: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *words], check=True, capture_output=True)
    return done.stdout.decode().strip()


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats a token to bits a byte of text."""
    return loss / math.log(2) / bytes_per_token
