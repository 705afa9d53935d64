"""Rebuild every experiment's figure and table from its committed results.

    python -m experiments.figures
"""

import importlib
from pathlib import Path

from engram_jax.results.figures import save
from engram_jax.sweeps.sweep import from_csv

HERE = Path(__file__).parent


def rebuild(name: str) -> str | None:
    """Write the figure beside results.csv and return the table; None without results."""
    committed = HERE / name / "results.csv"
    if not committed.exists():
        return None
    report = importlib.import_module(f"experiments.{name}.report")
    results = from_csv(committed.read_text())
    save(report.figure(results), HERE / name / report.FIGURE)
    return str(report.table(results))


if __name__ == "__main__":
    for name in sorted(path.parent.name for path in HERE.glob("*/report.py")):
        print(f"# {name}\n\n{rebuild(name) or 'no results'}\n")
