"""Loss against slots: the lines, and the paper's beside them."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from engram_jax.accounting import short
from engram_jax.analysis import arms, figures, fits
from engram_jax.analysis.arms import Result
from engram_jax.analysis.statistics import interval
from experiments import published

FIGURE = "loss_against_slots.png"
BASELINE = "no-memory"
LOOKS = {"Engram": (figures.BLUE, "o"), "OverEncoding": (figures.ORANGE, "s")}

Points = Sequence[tuple[float, float]]


def table(results: Sequence[Result]) -> str:
    """Every arm, and the lines through Engram's and OverEncoding's runs."""
    lines = [arms.table(results, BASELINE), ""]
    for text, found in arms.by_text(results).items():
        for memory in LOOKS:
            line = fits.line(*_columns(_points(found, memory)))
            if line is not None:
                lines.append(f"{text}, {memory}: {line}")
    return "\n".join(lines)


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each text, and one of the paper's figure 3."""
    texts = arms.by_text(results)
    drawn, axes = figures.panels(len(texts) + 1)
    for each, (text, found) in zip(axes, texts.items(), strict=False):
        first = found[0]
        figures.title(each, f"{text}: {short(first['active_params'])} active, "
                      f"{short(first['tokens'])} tokens")
        _panel(each, {memory: _points(found, memory) for memory in LOOKS})
        bare = arms.losses(found).get(BASELINE)
        if bare:
            figures.level(each, interval(bare.values()).mean, "no memory, same FLOPs")
    figures.title(axes[-1], "the paper: 568M active")
    _panel(axes[-1], {"Engram": published.ENGRAM_SLOTS,
                      "OverEncoding": published.OVER_ENCODING_SLOTS})
    figures.level(axes[-1], published.NO_MEMORY, "no memory")
    return drawn


def _points(results: Sequence[Result], memory: str) -> Points:
    return [(result["slots"], result["loss"]) for result in results if result["memory"] == memory]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _panel(axes: Axes, series: dict[str, Points]) -> None:
    axes.set_xscale("log")
    for name, points in series.items():
        colour, marker = LOOKS[name]
        sizes = sorted({slots for slots, _ in points})
        if not sizes:
            continue
        found = [interval(loss for slots, loss in points if slots == size) for size in sizes]
        figures.points(axes, sizes, found, colour, marker)
        slope = ""
        if (line := fits.line(*_columns(points))) is not None:
            axes.plot(sizes, [float(line(size)) for size in sizes], color=colour, linewidth=1.2,
                      alpha=0.7)
            margin = (line.high - line.low) / 2
            slope = f"\n{line.slope:+.4f} ± {margin:.4f}\na tenfold"
        figures.label(axes, name + slope, (sizes[-1], found[-1].mean), colour)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.45)  # room for the names
    axes.xaxis.set_major_formatter(FuncFormatter(lambda slots, _: short(slots)))
    axes.margins(y=0.12)
    axes.set_xlabel("slots (rows of one head's table)")
    axes.set_ylabel("validation loss (nats a token)")
