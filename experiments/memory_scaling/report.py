"""Loss against slots, less that without memory at equal seeds; the paper's points beside ours."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from engram_jax.costs.accounting import short
from engram_jax.results import arms, figures, fits
from engram_jax.results.arms import Result
from engram_jax.results.statistics import interval
from experiments import published

FIGURE = "loss_against_slots.png"
BASELINE = "no-memory"
BARE = "no memory"  # as results call its memory
LOOKS = {"Engram": (figures.BLUE, "o"), "OverEncoding": (figures.ORANGE, "s")}
PLACES = {"Engram": 0.03, "OverEncoding": 0.94}  # of their names, up the panel
PAPER = {"Engram": published.ENGRAM_SLOTS, "OverEncoding": published.OVER_ENCODING_SLOTS}

Points = Sequence[tuple[float, float, int]]


def table(results: Sequence[Result]) -> str:
    """Every arm, and the lines through Engram's and OverEncoding's runs."""
    lines = [arms.table(results, BASELINE), "",
             "less the loss without memory at the same seed, against log10(slots):"]
    for text, runs in arms.by_text(results).items():
        for memory in LOOKS:
            if (line := _line(gaps(runs, memory))) is not None:
                lines.append(f"{text}, {memory}: {line}")
            elif lost := arms.diverged(run for run in runs if run["memory"] in (memory, BARE)):
                lines.append(f"{text}, {memory}: no line, for {', '.join(lost)} diverged")
    return "\n".join(lines)


def gaps(results: Sequence[Result], memory: str) -> Points:
    """(slots, loss less that of no memory with the same seed, seed) of every run of a memory."""
    bare = arms.losses(results).get(BASELINE, {})
    return [(result["slots"], result["loss"] - bare[result["seed"]], result["seed"])
            for result in results if result["memory"] == memory and result["seed"] in bare]


def figure(results: Sequence[Result]) -> Figure:
    """A panel for each text, with the paper's figure 3 in outline."""
    texts = arms.by_text(results)
    drawn, axes = figures.panels(len(texts), 4.6)
    for each, (text, runs) in zip(axes, texts.items(), strict=True):
        first = runs[0]
        figures.title(each, f"{text}: {short(first['active_params'])} active, "
                      f"{short(first['tokens'])} tokens")
        for memory in LOOKS:
            _ours(each, memory, gaps(runs, memory))
            _paper(each, memory)
        figures.level(each, 0, "no memory, same FLOPs")
        each.set_xscale("log")
        each.set_xlim(600, 6e7)
        each.xaxis.set_major_formatter(FuncFormatter(lambda slots, _: short(slots)))
        each.minorticks_off()
        each.margins(y=0.12)
        each.set_xlabel("slots (rows of one head's table)")
        each.set_ylabel("loss less that without memory (nats a token)")
    return drawn


def _line(points: Points) -> fits.Line | None:
    return fits.line([slots for slots, _, _ in points], [gap for _, gap, _ in points],
                     [seed for _, _, seed in points])


def _ours(axes: Axes, memory: str, points: Points) -> None:
    """Means and intervals over seeds, and the line through all runs."""
    colour, marker = LOOKS[memory]
    sizes = sorted({slots for slots, _, _ in points})
    if not sizes:
        return
    intervals = [interval(gap for slots, gap, _ in points if slots == size) for size in sizes]
    figures.points(axes, sizes, intervals, colour, marker)
    slope = ""
    if (line := _line(points)) is not None:
        axes.plot(sizes, [float(line(size)) for size in sizes], color=colour, linewidth=1.2)
        margin = "" if line.high is None else f" ± {line.high - line.slope:.4f}"
        slope = f" {line.slope:+.4f}{margin} a tenfold".replace("-", "\N{MINUS SIGN}")
    axes.text(0.02, PLACES[memory], memory + slope, transform=axes.transAxes, color=colour,
              weight="bold")


def _paper(axes: Axes, memory: str) -> None:
    colour, marker = LOOKS[memory]
    slots = [count for count, _ in PAPER[memory]]
    gaps = [loss - published.NO_MEMORY for _, loss in PAPER[memory]]
    axes.plot(slots, gaps, marker, color=colour, markerfacecolor="white", markersize=5, alpha=0.8)
    if memory == "Engram":
        figures.label(axes, "the paper, 568M active", (slots[-1], gaps[-1]), figures.DARK,
                      (-110, -18))
