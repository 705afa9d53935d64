"""KL from the last layer's prediction and soft alignment by block, beside the paper's."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram_jax.results import figures
from engram_jax.results.statistics import Interval, interval, paired
from experiments import published

FIGURE = "lens_and_alignment.png"
BASELINE = "no-memory"
COLOURS = (figures.DARK, figures.BLUE, figures.GREEN)  # experts alone, then the arms with memory
MEASURES = {"kl": "KL from the last block's prediction (nats)",
            "alignment": "block of experts alone that it is like"}

Row = Mapping[str, Any]
Curves = Mapping[str, Mapping[int, Mapping[int, float]]]  # arm -> block -> seed -> value


def table(rows: Sequence[Row]) -> str:
    """For each text and measure a line an arm and block: the value, and that less the baseline's at
    equal seeds."""
    lines = []
    for text in dict.fromkeys(row["text"] for row in rows):
        for measure in MEASURES:
            lines += [f"{text}, {measure}", *_lines(_curves(rows, text, measure)), ""]
    return "\n".join(lines).rstrip()


def _lines(curves: Curves) -> list[str]:
    lines = []
    for arm, blocks in curves.items():
        for block, values in blocks.items():
            gap = paired(values, curves[BASELINE][block])
            less = "" if gap is None or arm == BASELINE else gap.signed()
            lines.append(f"  {arm:<14}block {block}{interval(values.values())!s:>28}{less:>30}")
    return lines


def figure(rows: Sequence[Row]) -> Figure:
    """A row of panels for each measure: our texts, and the paper."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    drawn, axes = figures.panels(len(texts) + 1, 3.7, len(MEASURES))
    panels = iter(axes)
    for measure, (name, paper) in zip(
        MEASURES, (("LogitLens", _paper_lens), ("soft alignment", _paper_alignment)), strict=True
    ):
        for text in texts:
            each = next(panels)
            figures.title(each, f"{name}: {text}")
            _ours(each, _curves(rows, text, measure))
            each.set_ylabel(MEASURES[measure])
        each = next(panels)
        figures.title(each, f"{name}: the paper")
        paper(each)
    for each in axes:
        each.set_xlabel("block")
        each.legend(frameon=False, labelcolor="linecolor", handlelength=1.2)
    return drawn


def _curves(rows: Sequence[Row], text: str, measure: str) -> Curves:
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for row in rows:
        if (row["text"], row["measure"]) == (text, measure):
            values = curves.setdefault(row["arm"], {}).setdefault(row["layer"], {})
            values[row["seed"]] = row["value"]
    return curves


def _ours(axes: Axes, curves: Curves) -> None:
    """Means over seeds, their 95 % as a band."""
    for (arm, blocks), colour in zip(curves.items(), COLOURS, strict=False):
        intervals = [interval(values.values()) for values in blocks.values()]
        axes.plot(list(blocks), [each.mean for each in intervals], "o-", color=colour, markersize=4,
                  label="experts alone" if arm == BASELINE else arm)
        lows, highs = zip(*map(_ends, intervals), strict=True)
        axes.fill_between(list(blocks), lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(list(curves[BASELINE]))


def _ends(value: Interval) -> tuple[float, float]:
    assert value.low is not None
    assert value.high is not None
    return value.low, value.high


def _paper_lens(axes: Axes) -> None:
    for (name, values), colour in zip(published.LENS.items(), COLOURS, strict=True):
        axes.plot(values, color=colour, label=name)


def _paper_alignment(axes: Axes) -> None:
    axes.plot([0, 29], [0, 29], "--", color=figures.DARK, linewidth=1, label="the same block")
    for (name, values), colour in zip(published.ALIGNMENT.items(), COLOURS[1:], strict=True):
        axes.plot(values, color=colour, label=name)
