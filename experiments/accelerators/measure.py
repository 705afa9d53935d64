"""Run every benchmark that is worth committing from an accelerator, and keep what it prints.

    python -m experiments.accelerators.measure DIR [NAME ...]

Each is a command of its own with a time limit, writes DIR/DEVICE-NAME.json, and takes nothing from
the others if it fails. On an H100 it ran step-tiny and step-small; the whole has never been run.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT_S = 600
BENCHMARKS = {
    "step-tiny": ("step", "--size", "tiny"),
    "step-small": ("step", "--size", "small"),
    "step-27b": ("step", "--size", "27b"),
    "experts": ("experts",),
    "attention": ("attention", "--length", "4096"),
    "offload-4b": ("offload", "--size", "4b", "--requests", "64"),
}


def main(words: list[str]) -> int:
    folder, names = Path(words[0]), words[1:] or list(BENCHMARKS)
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        start = time.monotonic()
        told = measured(name)
        failed += isinstance(told, str)
        if isinstance(told, dict):
            device = re.sub(r"\W+", "-", str(told["device"]).lower()).strip("-")
            (folder / f"{device}-{name}.json").write_text(json.dumps(told, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - start:.0f} s, "
              f"{told if isinstance(told, str) else 'ok'}", flush=True)
    return 1 if failed else 0


def measured(name: str) -> dict[str, Any] | str:
    """What a benchmark prints, or its last words."""
    command = [sys.executable, "-m", "engram_jax.cli", "bench", *BENCHMARKS[name], "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT_S} s"
    if done.returncode:
        return f"exit code {done.returncode}: {(done.stderr.strip() or '-').splitlines()[-1]}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
