"""Packing a text of gzipped JSON lines on one core and on all: how fast, and in how much memory.

The text is made up: words of Zipf frequencies, in documents of a few thousand bytes. The tokenizer
is trained before, on a part of it, so what is measured is reading, tokenizing and writing.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram_jax.data.encoding import cores
from engram_jax.data.tokenizer import train_bpe
from engram_jax.errors import MachineError

WORDS = 50_000
DOCUMENT_WORDS = 400
MEMBER_DOCUMENTS = 1000  # of one gzip member, which is repeated
VOCABULARY = 4096
PERIOD_S = 0.05


def packing_benchmark(megabytes: int = 64) -> dict[str, Any]:
    """Speed and memory of packing a file of `megabytes` of gzipped JSON lines.

    Returns:
      "text_mb" of UTF-8, "seconds" and "mb_per_s" on one core and on all, "speedup", the largest
      sum of resident memory of all its processes, "peak_rss_mb", and whether the shards are the
      same bytes.
    """
    with tempfile.TemporaryDirectory(prefix="engram-pack-") as name:
        folder = Path(name)
        documents = _documents(np.random.default_rng(0))
        train_bpe(documents[:1000], VOCABULARY).save(str(folder / "tokenizer.json"))
        text_bytes = _write(folder / "text.jsonl.gz", documents, megabytes * 10**6)
        one, every = (_measured(folder, count) for count in (1, cores()))
        return {
            "packed_mb": (folder / "text.jsonl.gz").stat().st_size / 1e6,
            "text_mb": text_bytes / 1e6, "cores": cores(),
            "seconds_one_core": one.seconds, "seconds_all_cores": every.seconds,
            "mb_per_s_one_core": text_bytes / 1e6 / one.seconds,
            "mb_per_s_all_cores": text_bytes / 1e6 / every.seconds,
            "speedup": one.seconds / every.seconds,
            "peak_rss_mb_one_core": one.peak_rss / 1e6,
            "peak_rss_mb_all_cores": every.peak_rss / 1e6,
            "same_bytes": one.checksums == every.checksums}


def _documents(random: np.random.Generator) -> list[str]:
    syllables = np.array(["ka", "lo", "mi", "su", "te", "ra", "no", "vi", "pe", "du", "en", "st"])
    lengths = random.integers(1, 5, WORDS)
    words = np.array(["".join(random.choice(syllables, length)) for length in lengths])
    frequency = 1 / np.arange(1, WORDS + 1)
    chosen = random.choice(words, (MEMBER_DOCUMENTS, DOCUMENT_WORDS), p=frequency / frequency.sum())
    return [" ".join(row) for row in chosen.tolist()]


def _write(file: Path, documents: list[str], size: int) -> int:
    """Write at least `size` bytes, one gzip member again and again; returns the bytes of text."""
    member = gzip.compress(b"".join(
        json.dumps({"text": text}).encode() + b"\n" for text in documents), compresslevel=1)
    count = max(-(-size // len(member)), 1)
    with file.open("wb") as sink:
        for _ in range(count):
            sink.write(member)
    return count * sum(len(text.encode()) for text in documents)


class Measured(NamedTuple):
    """One packing: its time, the most memory of all its processes together, and the shards."""

    seconds: float
    peak_rss: int
    checksums: list[str]


def _measured(folder: Path, count: int) -> Measured:
    """Pack in a process of its own that may use `count` cores."""
    command = [sys.executable, "-m", "engram_jax.cli", "pack", "tiny", "--json",
               "--processes", str(count), "--set", f"data.path={folder / 'text.jsonl.gz'}",
               "--set", f"data.tokenizer={folder / 'tokenizer.json'}",
               "--set", f"data.cache_dir={folder / f'cache {count}'}"]
    begin = time.monotonic()
    with subprocess.Popen([*_bound_to(count), *command], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        peak = _Peak(process.pid)
        answer, _ = process.communicate()
        seconds = time.monotonic() - begin
        peak.stop()
    if process.returncode:
        raise MachineError(f"packing on {count} cores ended with exit code {process.returncode}")
    meta = json.loads(answer)
    return Measured(seconds, peak.bytes, [*meta["train_sha256"], *meta["validation_sha256"]])


def _bound_to(count: int) -> list[str]:
    """What a command begins with to run on `count` cores; nothing where that cannot be asked."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    chosen = sorted(os.sched_getaffinity(0))[:count]
    return [sys.executable, "-c", f"import os, sys; os.sched_setaffinity(0, {chosen}); "
            "os.execv(sys.argv[1], sys.argv[1:])"]


class _Peak:
    """The most memory that a process and its children had together, looked at every PERIOD_S."""

    def __init__(self, process: int):
        self.bytes, self._process, self._ended = 0, process, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self.bytes = max(self.bytes, sum(map(_resident, self._family())))

    def _family(self) -> list[int]:
        try:
            children = Path(f"/proc/{self._process}/task/{self._process}/children").read_text()
        except OSError:  # it has just ended
            return []
        return [self._process, *map(int, children.split())]


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0
