"""Runs of several seeds grouped into arms, and their table.

A result is what result.json holds. Runs named ARM-seedN are one arm.
"""

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
    found: dict[str, dict[int, float]] = {}
    for result in results:
        found.setdefault(arm(result), {})[result["seed"]] = result["loss"]
    return found


def by_text(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each text."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["text"], []).append(result)
    return found


def table(results: Sequence[Result], baseline: str) -> str:
    """For each text a line an arm: mean loss with its 95 % interval over seeds, the difference
    from `baseline` at equal seeds, sizes and speed."""
    return "\n\n".join(_of_text(text, found, baseline) for text, found in by_text(results).items())


def _of_text(text: str, results: Sequence[Result], baseline: str) -> str:
    arms = losses(results)
    first = {arm(result): result for result in reversed(results)}
    width = 2 + max(len(name) for name in [*arms, text])
    lines = [f"{text:<{width}}{'loss (95 %)':>26}{'against ' + baseline:>30}{'seeds':>7}"
             f"{'total':>9}{'active':>9}{'memory':>9}{'FLOPs/token':>13}{'tokens/s':>10}"]
    lines.append("-" * len(lines[0]))
    for name, found in arms.items():
        sizes, gap = first[name], paired(found, arms.get(baseline, {}))
        speeds = [result["tokens_per_s"] for result in results if arm(result) == name]
        lines.append(
            f"{name:<{width}}{interval(found.values())!s:>26}"
            f"{'' if gap is None or name == baseline else gap.signed():>30}{len(found):>7}"
            f"{short(sizes['total_params']):>9}{short(sizes['active_params']):>9}"
            f"{short(sizes['memory_params']):>9}{short(sizes['flops_per_token']):>13}"
            f"{interval(speeds).mean:>10,.0f}")
    return "\n".join(lines)
