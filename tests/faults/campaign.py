"""The whole campaign of faults, and its table: `make test-faults`.

    python tests/faults/campaign.py [--share 0.1] [--only WORD] [--folder FOLDER]
"""

import argparse
import pathlib
import random
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


def a_run(folder, **training):
    """A run of 40 steps, of milliseconds each, that saves and evaluates often."""
    text = write_text(folder / "text.txt")
    run = plain(micro(text, steps=40, checkpoint_every=5, evaluate_every=10, **training))
    return with_data(run, cache_dir=""), text


def kinds(folder, share):
    """Name and deed of each kind of fault; a deed returns outcomes."""
    def times(number):
        return max(1, round(number * share))

    run, text = a_run(folder)
    made = {}

    def single():
        if "single" not in made:
            (folder / "single").mkdir()
            made["single"] = kills.Runs(victims, run, folder / "single")
        return made["single"]

    def pairs():
        (folder / "pairs").mkdir(exist_ok=True)
        return kills.Pairs(victims, run, folder / "pairs")

    def fuzzed():
        if "fuzz" not in made:
            whole = single().folder / "whole"
            export_tables(whole, "fp8")
            (folder / "fuzz").mkdir()
            made["fuzz"] = fuzz.Fuzz(whole, folder / "fuzz")
        return made["fuzz"]

    victims = kills.Victims(folder)
    yield "start", victims.__enter__
    for name, number in (("SIGKILL", KILL), ("SIGTERM", TERM)):
        for phase, count in ((None, 50), ("saving", 20), ("restoring", 15), ("packing", 15)):
            yield f"{name} {f'while {phase}' if phase else 'at any moment'}", (
                lambda number=number, phase=phase, count=count: single().killed(
                    number, phase, times(count)))
    for name, number in (("SIGKILL", KILL), ("SIGTERM", TERM)):
        yield f"{name} of one of two processes", (
            lambda number=number: pairs().killed(number, times(6)))
    yield "disk full", lambda: single().full_disk(times(16))
    yield "file of a checkpoint damaged", lambda: single().damaged_checkpoint(times(30))
    yield "file of the cache damaged", lambda: single().damaged_cache(times(12))
    yield "text away and back", lambda: single().text_away(times(3), text)
    yield "table file damaged", lambda: fuzz.tables(
        next((fuzzed().run / "tables").glob("*.table")), random.Random(1), times(100))
    yield "fuzzed files", lambda: [one for many in fuzzed().files(times(120)).values()
                                   for one in many]
    yield "fuzzed settings", lambda: fuzzed().overrides(times(300))
    yield "fuzzed prompts", lambda: fuzzed().prompts(times(100))
    yield "stop", lambda: victims.__exit__(None, None, None)


def campaign(folder, share=1.0, only="", say=print):
    """Do it all; returns rows of name, times, recovered, stopped, and texts of what was lost."""
    rows = []
    for name, deed in kinds(folder, share):
        if name in ("start", "stop"):
            deed()
            continue
        if only not in name:
            continue
        begin = time.monotonic()
        outcomes = deed()
        lost = [one for one in outcomes if one not in ("recovered", "stopped")]
        row = (name, len(outcomes), outcomes.count("recovered"), outcomes.count("stopped"), lost)
        rows.append(row)
        say(f"| {name} | {row[1]} | {row[2]} | {row[3]} | {len(lost)} |")
        print(f"{name}: {time.monotonic() - begin:.0f} s", *lost[:5], sep="\n    ",
              file=sys.stderr, flush=True)
    return rows


def main():
    words = argparse.ArgumentParser()
    words.add_argument("--share", type=float, default=1.0)
    words.add_argument("--only", default="")
    words.add_argument("--folder", default="")
    options = words.parse_args()
    folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(exist_ok=True)
    print("| fault | tried | recovered bit-equal, or taken | stopped cleanly, or refused | lost |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    rows = campaign(folder, options.share, options.only,
                    lambda line: print(line, flush=True))
    lost = [one for row in rows for one in row[4]]
    if not lost and not options.folder:
        shutil.rmtree(folder)
    print(f"| all | {sum(row[1] for row in rows)} | {sum(row[2] for row in rows)} | "
          f"{sum(row[3] for row in rows)} | {len(lost)} |")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
