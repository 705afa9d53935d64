"""Rebuild every experiment's figure and tables from its committed results.

    python -m experiments.figures
"""

import importlib
from pathlib import Path

from engram_jax.results.figures import save
from engram_jax.sweeps.sweep import from_csv

HERE = Path(__file__).parent


def rebuild(name: str) -> str | None:
    """Write the figure beside results.csv and return its table, and that of best.csv if there is
    one; None without results."""
    committed = HERE / name / "results.csv"
    if not committed.exists():
        return None
    report = importlib.import_module(f"experiments.{name}.report")
    save(report.figure(from_csv(committed.read_text())), HERE / name / report.FIGURE)
    return "\n\n".join(str(report.table(from_csv(path.read_text())))
                       for path in (committed, committed.with_name("best.csv")) if path.exists())


if __name__ == "__main__":
    for name in sorted(path.parent.name for path in HERE.glob("*/report.py")):
        print(f"# {name}\n\n{rebuild(name) or 'no results'}\n")
