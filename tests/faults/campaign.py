"""The whole campaign of faults, and its table: `make test-faults`.

    python tests/faults/campaign.py [--share 0.1] [--only REGEX] [--folder FOLDER] [--parts 2]
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from faults import fuzz, kills
from micro import micro, plain, with_data, write_text

from engram_jax.runs.export import export_tables

KILL, TERM = signal.SIGKILL, signal.SIGTERM
PHASES = {None: 50, "saving": 20, "restoring": 15, "packing": 15}  # kills of each signal


class Bench:
    """What faults are tried on, all in one folder: a text, a run of it, and who starts runs.

    Use as a context manager.
    """

    def __init__(self, folder, seed=0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seed = folder, seed
        self.text = write_text(folder / "text.txt")
        # 40 steps, of milliseconds each, that save and evaluate often.
        run = plain(micro(self.text, steps=40, checkpoint_every=5, evaluate_every=10))
        self.run = with_data(run, cache_dir="")
        self.victims = kills.Victims(folder)

    def __enter__(self):
        self.victims.__enter__()
        return self

    def __exit__(self, *error):
        self.victims.__exit__(*error)

    @functools.cached_property
    def single(self):
        return kills.Runs(self.victims, self.run, self._sub("single"), self.seed)

    @functools.cached_property
    def pairs(self):
        return kills.Pairs(self.victims, self.run, self._sub("pairs"), self.seed)

    @functools.cached_property
    def fuzzed(self):
        whole = self.single.folder / "whole"
        export_tables(whole, "fp8")
        return fuzz.Fuzz(whole, self._sub("fuzz"), self.seed)

    def tables(self, times):
        [table] = (self.fuzzed.run / "tables").glob("*.table")
        return fuzz.tables(table, random.Random(self.seed), times)

    def _sub(self, name):
        (self.folder / name).mkdir()
        return self.folder / name


def kinds():
    """Of each kind of fault its name, how many times, and the deed, which returns outcomes."""
    for number in (KILL, TERM):
        for phase, count in PHASES.items():
            yield f"{number.name} {f'while {phase}' if phase else 'at any moment'}", count, (
                lambda bench, times, number=number, phase=phase: bench.single.killed(
                    number, phase, times))
    for number in (KILL, TERM):
        yield f"{number.name} of one of two processes", 6, (
            lambda bench, times, number=number: bench.pairs.killed(number, times))
    yield "disk full", 16, lambda bench, times: bench.single.full_disk(times)
    yield "file of a checkpoint damaged", 30, (
        lambda bench, times: bench.single.damaged_checkpoint(times))
    yield "file of the cache damaged", 16, lambda bench, times: bench.single.damaged_cache(times)
    yield "text away and back", 4, lambda bench, times: bench.single.text_away(times, bench.text)
    yield "table file damaged", 100, lambda bench, times: bench.tables(times)
    # So many of each of the kinds of files.
    yield "fuzzed files", 120, lambda bench, times: [
        one for many in bench.fuzzed.files(times).values() for one in many]
    yield "fuzzed settings", 300, lambda bench, times: bench.fuzzed.overrides(times)
    yield "fuzzed prompts", 100, lambda bench, times: bench.fuzzed.prompts(times)


def part(folder, share=1.0, only="", seed=0):
    """Try `share` of all faults whose names `only`, a regular expression, is found in.

    Returns:
      Of each kind its name and the outcomes.
    """
    os.environ["ENGRAM_CACHE"] = str(folder / "cache")  # the fuzzing is in this process
    rows = []
    with Bench(folder, seed) as bench:
        for name, count, deed in kinds():
            if not re.search(only, name):
                continue
            begin = time.monotonic()
            rows.append((name, deed(bench, max(1, round(count * share)))))
            print(f"{row(*rows[-1])} {time.monotonic() - begin:.0f} s", *lost(rows[-1][1])[:5],
                  sep="\n    ", file=sys.stderr, flush=True)
    return rows


def campaign(folder, share=1.0, only="", parts=1):
    """All of it in some parts side by side, each in a process and a folder of its own.

    Returns:
      As `part`.
    """
    if parts == 1:
        return part(folder, share, only)
    spawning = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(parts, spawning) as pool:
        made = list(pool.map(part, *zip(*[
            (folder / str(number), share / parts, only, number) for number in range(parts)],
            strict=True)))
    return [(same[0][0], [one for _, outcomes in same for one in outcomes])
            for same in zip(*made, strict=True)]


def lost(outcomes):
    return [one for one in outcomes if one not in ("recovered", "stopped")]


def row(name, outcomes):
    return (f"| {name} | {len(outcomes)} | {outcomes.count('recovered')} | "
            f"{outcomes.count('stopped')} | {len(lost(outcomes))} |")


def table(rows):
    """The lines of the table."""
    yield "| fault | tried | recovered bit-equal, or taken | stopped cleanly, or refused | lost |"
    yield "| --- | --- | --- | --- | --- |"
    every = [one for _, outcomes in rows for one in outcomes]
    for name, outcomes in [*rows, ("all", every)]:
        yield row(name, outcomes)


def main():
    words = argparse.ArgumentParser()
    words.add_argument("--share", type=float, default=1.0)
    words.add_argument("--only", default="")
    words.add_argument("--folder", default="")
    words.add_argument("--parts", type=int, default=2, help="that run side by side")
    options = words.parse_args()
    folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix="faults-"))
    rows = campaign(folder, options.share, options.only, options.parts)
    print(*table(rows), sep="\n")
    ill = [one for _, outcomes in rows for one in lost(outcomes)]
    if not ill and not options.folder:
        shutil.rmtree(folder)
    return 1 if ill else 0


if __name__ == "__main__":
    sys.exit(main())
