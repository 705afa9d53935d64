"""Losses by optimizer, paired by seed with dense Adam; run as a module to rebuild the figure."""

import io
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import scipy.stats
from etils import epath

from engram_jax.config import RunConfig
from engram_jax.memory.row_optimizers import row_optimizer, state_bytes
from engram_jax.storage import write_text
from experiments.row_optimizers.configs import MULTIPLIERS, runs

HERE = Path(__file__).parent
FIGURE = "loss_by_optimizer.png"
ORACLE = "dense_adam"
COLOURS = ("#56B4E9", "#0072B2", "#D55E00")  # Okabe and Ito's, one a rate

Results = Sequence[dict[str, Any]]


def report(results: Results, place: epath.Path, say: Callable[[str], None]) -> None:
    """Write results.json, table.txt and the figure to `place`."""
    write_text(place / "results.json", json.dumps(list(results), indent=1) + "\n")
    text = table(results)
    write_text(place / "table.txt", text + "\n")
    (place / FIGURE).write_bytes(figure(results))
    say("\n" + text)
    say(f"figure: {place / FIGURE}")


def table(results: Results) -> str:
    """A line each arm: mean loss with the spread over seeds, and the paired difference."""
    grouped = arms(results)
    lines = [f"{'optimizer':<24}{'rate':>7}{'loss':>9}{'sd':>8}{'against dense Adam (95 %)':>33}"
             f"{'state B/row':>13}{'seeds':>7}"]
    for (optimizer, multiplier), losses in grouped.items():
        oracle = grouped.get((ORACLE, multiplier), {})
        spread = f"{statistics.stdev(losses.values()):.4f}" if len(losses) > 1 else "-"
        lines.append(
            f"{optimizer:<24}{f'x{multiplier:g}':>7}{statistics.mean(losses.values()):>9.4f}"
            f"{spread:>8}{difference(losses, oracle):>33}{_bytes(optimizer):>13}{len(losses):>7}")
    return "\n".join(lines)


def arms(results: Results) -> dict[tuple[str, float], dict[int, float]]:
    """(optimizer, multiplier) -> seed -> loss."""
    by_name = {run.name: run for run in runs()}
    found: dict[tuple[str, float], dict[int, float]] = {}
    for result in results:
        run = by_name[result["name"]]
        key = label(run), run.optimizer.table_multiplier
        found.setdefault(key, {})[run.training.seed] = result["loss"]
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != ORACLE, item[0])))


def label(run: RunConfig) -> str:
    """The optimizer's name, with the table's dtype where it is not float32."""
    assert run.model.engram is not None
    half = run.model.engram.table_dtype == "bfloat16"
    return run.optimizer.table_optimizer + (" bfloat16" if half else "")


def difference(losses: dict[int, float], oracle: dict[int, float]) -> str:
    """Mean of the differences at equal seeds with the 95 % interval of Student's t."""
    seeds = sorted(losses.keys() & oracle.keys())
    gaps = [losses[seed] - oracle[seed] for seed in seeds]
    if len(gaps) < 2 or not any(gaps):
        return "-"
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    margin = scipy.stats.t.ppf(0.975, len(gaps) - 1) * error
    return f"{mean:+.4f} ({mean - margin:+.4f} to {mean + margin:+.4f})"


def _bytes(optimizer: str) -> int:
    run = next(run for run in runs() if label(run) == optimizer)
    assert run.model.engram is not None
    return state_bytes(row_optimizer(run.optimizer), run.model.engram.head_dim)


def figure(results: Results) -> bytes:
    """Every run's loss by optimizer and rate, as PNG."""
    grouped = arms(results)
    names = list(dict.fromkeys(optimizer for optimizer, _ in grouped))
    drawn, axes = plt.subplots(figsize=(8.6, 4.2), dpi=150)
    for shift, (multiplier, colour) in enumerate(zip(MULTIPLIERS, COLOURS, strict=True)):
        for row, name in enumerate(names):
            losses = list(grouped.get((name, multiplier), {}).values())
            if not losses:
                continue
            height = [row + 0.22 * (shift - 1)] * len(losses)
            axes.plot(losses, height, "o", color=colour, markersize=5, alpha=0.75)
            axes.plot(statistics.mean(losses), height[0], "|", color=colour, markersize=15,
                      markeredgewidth=2, label=f"x{multiplier:g}" if row == 0 else None)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats a token); a dot a seed, a bar their mean")
    axes.legend(title="tables' rate over\nthe backbone's", frameon=False, loc="upper left",
                bbox_to_anchor=(1.0, 1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    drawn.tight_layout()
    image = io.BytesIO()
    drawn.savefig(image, format="png")
    plt.close(drawn)
    return image.getvalue()


if __name__ == "__main__":
    committed = json.loads((HERE / "results.json").read_text())
    (HERE / FIGURE).write_bytes(figure(committed))
    print(table(committed))
