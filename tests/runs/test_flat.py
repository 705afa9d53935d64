"""Long runs and long service: memory, open files, threads and logs stay as they are."""

import gc
import os
import pathlib
import threading
from typing import NamedTuple

import pytest
from micro import with_training

from engram_jax.inference import serving
from engram_jax.inference.engine import Request
from engram_jax.runs import train
from engram_jax.runs.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compilations")]
COUNT, EVERY = 2000, 20  # of steps or sequences, and those between two looks
MIB = 2**20


class Usage(NamedTuple):
    """What a process holds."""

    resident: int  # bytes
    handles: int
    threads: int


def usage():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return Usage(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")),
                 threading.active_count())


def assert_flat(looks):
    """The least that was held in the second quarter and in the last one: what grows with every step
    or sequence, by 16 KiB or a file in a thousand, raises it; a checkpoint under way does not."""
    quarter = len(looks) // 4
    before, after = (Usage(*map(min, zip(*part, strict=True)))
                     for part in (looks[quarter:2 * quarter], looks[-quarter:]))
    print(f"\nresident {before.resident / MIB:.1f} MiB, then {after.resident / MIB:.1f} MiB; "
          f"files {before.handles}, then {after.handles}; threads {before.threads}, then "
          f"{after.threads}")
    assert after.resident - before.resident < COUNT // 2 * 16 * 2**10
    assert after.handles <= before.handles
    assert after.threads <= before.threads


def test_two_thousand_steps(trained, tmp_path, monkeypatch):
    run = with_training(RunDirectory(trained).config(), steps=COUNT, log_every=2,
                        checkpoint_every=50, evaluate_every=100)
    looks, sizes, said, put = [], [], [], train.placement.put

    def looking(*words):
        looks.append(usage())
        sizes.append((tmp_path / "metrics.jsonl").stat().st_size if len(looks) > 3 else 0)
        return put(*words)

    monkeypatch.setattr(train.placement, "put", looking)
    train.train(run, tmp_path, said.append)
    assert len(looks) == COUNT
    assert_flat(looks[::EVERY])
    halves = sizes[COUNT // 2], sizes[-1] - sizes[COUNT // 2]
    print(f"metrics.jsonl: {halves[0]:,} bytes, then {halves[1]:,}; {len(said)} lines were said")
    assert halves[1] < 1.05 * halves[0]
    assert len(said) < 30
    assert len(list((tmp_path / "checkpoints").iterdir())) == run.training.keep_checkpoints
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "config.json", "env.json", "hash.json", "metrics.jsonl", "result.json",
        "tokenizer.json"]


@pytest.mark.parametrize("memory", ["device", "host"])
def test_two_thousand_sequences(trained, memory):
    looks = []
    with serving.engine(trained, memory, slots=4, length=16, chunk=8) as engine:
        for start in range(0, COUNT, EVERY):
            requests = [Request(prompt=(2 + number % 200, 3, 5), tokens=4, temperature=1.0,
                                seed=number) for number in range(start, start + EVERY)]
            assert all(engine.generate(requests))
            gc.collect()
            looks.append(usage())
    assert_flat(looks)
