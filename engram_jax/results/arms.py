"""Runs of several seeds grouped into arms, and their table.

A result is what result.json holds. Runs named ARM-seedN are one arm.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram_jax.costs.accounting import short
from engram_jax.results.statistics import interval, paired

Result = Mapping[str, Any]


def arm(result: Result) -> str:
    """The name of a run's arm: its own without the seed."""
    return str(result["name"]).removesuffix(f"-seed{result['seed']}")


def losses(results: Iterable[Result]) -> dict[str, dict[int, float]]:
    """arm -> seed -> validation loss, arms in the order of their first run."""
    grouped: dict[str, dict[int, float]] = {}
    for result in results:
        grouped.setdefault(arm(result), {})[result["seed"]] = result["loss"]
    return grouped


def diverged(results: Iterable[Result]) -> list[str]:
    """The names of the runs whose loss is not finite, each once."""
    return list(dict.fromkeys(
        str(result["name"]) for result in results if not math.isfinite(result["loss"])))


def by_text(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each text."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result["text"], []).append(result)
    return grouped


def table(results: Sequence[Result], baseline: str) -> str:
    """For each text a line an arm: mean loss with its 95 % interval over seeds, the difference
    from `baseline` at equal seeds, sizes and speed. An arm with a run that diverged has no mean:
    that of the other seeds would be one of the lucky."""
    return "\n\n".join(_of_text(text, runs, baseline) for text, runs in by_text(results).items())


def _of_text(text: str, results: Sequence[Result], baseline: str) -> str:
    arms, lost = losses(results), diverged(results)
    width = 2 + max(len(name) for name in [*arms, text])
    lines = [f"{text:<{width}}{'loss (95 %)':>26}{'against ' + baseline:>30}{'seeds':>7}"
             f"{'total':>9}{'active':>9}{'memory':>9}{'FLOPs/token':>13}{'tokens/s':>10}"]
    lines.append("-" * len(lines[0]))
    for name, own in arms.items():
        runs = [result for result in results if arm(result) == name]
        loss, gap = _outcome(own, {} if name == baseline else arms.get(baseline, {}))
        lines.append(
            f"{name:<{width}}{loss:>26}{gap:>30}{len(own):>7}"
            f"{short(runs[0]['total_params']):>9}{short(runs[0]['active_params']):>9}"
            f"{short(runs[0]['memory_params']):>9}{short(runs[0]['flops_per_token']):>13}"
            f"{interval(result['tokens_per_s'] for result in runs).mean:>10,.0f}")
    return "\n".join([*lines, *(f"{name}: diverged" for name in lost)])


def _outcome(own: Mapping[int, float], other: Mapping[int, float]) -> tuple[str, str]:
    """The loss, and the difference from the other arm; "" where there is none to tell."""
    if not all(map(math.isfinite, own.values())):
        return "diverged", ""
    gap = paired(own, other) if all(map(math.isfinite, other.values())) else None
    return str(interval(own.values())), "" if gap is None else gap.signed()
