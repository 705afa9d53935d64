"""How plots look: colours that everybody can tell in light and dark, axes, and the figures.

A figure names its colours as they are on white; `swap` says what each is on black, and
the page's script puts those in. The base is Okabe and Ito's palette, as in `results.figures`.
"""

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from engram_jax.config import RunConfig
from engram_jax.results.comparing import Arm
from engram_jax.results.statistics import Interval

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif'
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
ROW = 27  # pixels of a line of text in a plot
RETURN, TAB = "\N{RETURN SYMBOL}", "\N{RIGHTWARDS ARROW TO BAR}"

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, GREY, YELLOW = "#E69F00", "#56B4E9", "#7A828C", "#B8A800"
INK, FAINT, GRID, SURFACE = "#24292F", "#5A626B", "#E4E7EB", "#FFFFFF"

ON_BLACK = {
    BLUE: "#4A9FDB", ORANGE: "#F0803C", GREEN: "#2FBF95", PURPLE: "#DE9CC2", AMBER: "#F0B429",
    SKY: "#8FD0F5", GREY: "#969EA8", YELLOW: "#D6C834",
    INK: "#E6E9ED", FAINT: "#A4ACB5", GRID: "#30363D", SURFACE: "#14181D"}
HUES = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, YELLOW)
RAMPS = {  # on white and on black, a small memory's to a large one's: the larger stands out more
    "Engram": (("#8FC6EA", "#003F6B"), ("#3F79A8", "#A6DBFF")),
    "OverEncoding": (("#F2B68E", "#8F3B00"), ("#97613F", "#FFB98A"))}


@dataclasses.dataclass(frozen=True)
class Look:
    """How an arm is drawn: a colour on white and on black, and a symbol."""

    light: str
    dark: str
    symbol: str = "circle"


@dataclasses.dataclass(frozen=True)
class Key:
    """A name in a plot's legend."""

    name: str
    look: Look


def memory_kind(run: RunConfig) -> str:
    """What a run has for a memory, in words."""
    if run.model.engram is not None:
        return "Engram"
    return "OverEncoding" if run.model.over_encoding is not None else "no memory"


def slots(run: RunConfig) -> int:
    """Rows of one head's table; 0 without memory."""
    memory = run.model.engram or run.model.over_encoding
    return memory.rows_per_head[0] if memory else 0


def looks(arms: Sequence[Arm]) -> list[Look]:
    """A look for each arm: grey without memory, a ramp where the size of a memory is what differs,
    else a hue each."""
    runs = [arm.runs[0].config for arm in arms]
    known = [(memory_kind(run), slots(run)) for run in runs]
    if len(set(known)) == len(known) and len(known) > 2:
        return [_by_size(known, kind, size) for kind, size in known]
    looks, hue = [], 0
    for kind, _ in known:
        if kind == "no memory" and known.count((kind, 0)) == 1:
            looks.append(_plain(GREY, "diamond"))
            continue
        looks.append(_plain(HUES[hue % len(HUES)], SYMBOLS[hue // len(HUES) % len(SYMBOLS)]))
        hue += 1
    return looks


def _plain(colour: str, symbol: str = "circle") -> Look:
    return Look(colour, ON_BLACK[colour], symbol)


def _by_size(known: Sequence[tuple[str, int]], kind: str, size: int) -> Look:
    if kind not in RAMPS:
        return _plain(GREY, "diamond")
    sizes = sorted(each for name, each in known if name == kind)
    share = sizes.index(size) / (len(sizes) - 1) if len(sizes) > 1 else 0.7
    light, dark = (_between(*ends, share) for ends in RAMPS[kind])
    return Look(light, dark, "circle" if kind == "Engram" else "square")


def _between(start: str, stop: str, share: float) -> str:
    """The colour so far on the way; 0 is the start."""
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (start, stop)]
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(*ends, strict=True))


def swap(arms_looks: Sequence[Look]) -> dict[str, str]:
    """Each colour of the page's plots on white, and what it is on black."""
    return {**ON_BLACK, **{look.light: look.dark for look in arms_looks}}


def plain(text: str) -> str:
    """Text that a plot shows as it is: plotly reads tags in it."""
    return html.escape(text, quote=False)


def shortened(name: str, length: int = 26) -> str:
    """A name for a plot's margin."""
    if len(name) <= length:
        return plain(name)
    half = (length - 1) // 2
    return plain(f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}")


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def visible(text: str) -> str:
    """Text with its spaces and line breaks to be seen."""
    def run(match: re.Match[str]) -> str:
        count = len(match.group())
        return "\N{OPEN BOX}" if count == 1 else f"\N{OPEN BOX}\N{MULTIPLICATION SIGN}{count}"

    return re.sub(" +", run, text.replace("\n", RETURN).replace("\t", TAB))


def ranges(lows: Sequence[int]) -> list[str]:
    """Names of bands that begin at so much, each up to the next."""
    stops = [*(low - 1 for low in lows[1:]), None]
    return [f"{low:,}+" if stop is None else f"{low:,}" if stop == low
            else f"{low:,}\N{EN DASH}{stop:,}" for low, stop in zip(lows, stops, strict=True)]


def keys(subjects: Iterable[Any]) -> list[Key]:
    """The names of arms and how they are drawn."""
    return [Key(subject.name, subject.look) for subject in subjects]


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """A plain axis: a faint grid, no frame."""
    return {"title": {"text": title, "font": {"size": 12, "color": FAINT}, "standoff": 10},
            "gridcolor": GRID, "zeroline": False, "automargin": True, "tickcolor": GRID,
            "tickfont": {"color": FAINT, "size": 11.5}, "linecolor": GRID, **more}


def rows_axis(names: Sequence[str]) -> dict[str, Any]:
    """An axis with a name a row, the first on top, in the order given."""
    return axis(
        tickmode="array", tickvals=list(range(len(names))), showgrid=False,
        ticktext=[f"{shortened(name)}\N{NO-BREAK SPACE}" for name in names],
        range=[len(names) - 0.5, -0.5], ticks="", tickfont={"color": INK, "size": 12})


def height(rows: int) -> int:
    """Pixels of a plot with so many rows: room for its axis below them."""
    return max(140, 76 + ROW * rows)


def log_axis(title: str, **more: Any) -> dict[str, Any]:
    """A logarithmic axis whose ticks are powers of ten."""
    return axis(title, type="log", dtick=1, tickformat="~s", **more)


def figure(
    traces: Sequence[Any], x: Mapping[str, Any], y: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The JSON value of a figure in the house's looks."""
    made = go.Figure(
        data=list(traces),
        layout={"template": "none", "xaxis": x, "yaxis": y, "showlegend": False, "dragmode": False,
                "hovermode": "closest", "paper_bgcolor": "rgba(0,0,0,0)",
                "plot_bgcolor": "rgba(0,0,0,0)", "bargap": 0.35,
                "font": {"family": FONT, "size": 12, "color": INK},
                "margin": {"l": 8, "r": 16, "t": 10, "b": 8, **more.pop("margin", {})},
                "hoverlabel": {"bgcolor": SURFACE, "bordercolor": GRID, "align": "left",
                               "font": {"family": FONT, "size": 12, "color": INK}}, **more})
    value: dict[str, Any] = json.loads(made.to_json())
    return value


def curve(
    name: str, look: Look, x: Sequence[float | str], y: Sequence[float | None], hover: str,
    markers: bool = True, **more: Any,
) -> go.Scatter:
    """A line with small points; `hover` is a template behind the name."""
    return go.Scatter(
        x=list(x), y=list(y), mode="lines+markers" if markers else "lines", meta=name, name=name,
        line={"color": look.light, "width": 1.8}, hovertemplate=f"{plain(name)}<br>{hover}"
        "<extra></extra>",
        marker={"color": look.light, "size": 6, "symbol": look.symbol}, **more)


def dots(
    name: str, look: Look, x: Sequence[float], y: Sequence[float], hover: str,
    intervals: Sequence[Interval] | None = None, **more: Any,
) -> go.Scatter:
    """Points, with the ends of their intervals along x if they are given."""
    error = None
    if intervals is not None and any(each.low is not None for each in intervals):
        error = {"type": "data", "symmetric": False, "thickness": 1.4, "width": 4,
                 "color": look.light,
                 "array": [(each.high or each.mean) - each.mean for each in intervals],
                 "arrayminus": [each.mean - (each.low or each.mean) for each in intervals]}
    marker = {"color": look.light, "size": 10, "symbol": look.symbol, **more.pop("marker", {})}
    return go.Scatter(
        x=list(x), y=list(y), mode="markers", meta=name, name=name, error_x=error, marker=marker,
        hovertemplate=f"{plain(name)}<br>{hover}<extra></extra>", **more)
