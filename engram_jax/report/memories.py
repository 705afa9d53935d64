"""The sections on what memory is made of: the compressed vocabulary, and how rows are used."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from engram_jax.insides import memory_use
from engram_jax.report import looks
from engram_jax.report.blocks import Block, Cell, Numbers, Plot, Section, Table
from engram_jax.report.findings import Material, Subject
from engram_jax.report.looks import Key, Look

POINTS = 200  # of a curve over ranks
DASHES = ("solid", "dash", "dot", "dashdot")  # of orders


def tokenizer(material: Material) -> Section:
    """What compression merges, once for each tokenizer."""
    findings = material.of("tokenizer")
    grouped: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for name, values in findings.values.items():
        grouped.setdefault(repr(values), ([], values))[0].append(name)
    blocks: list[Block] = []
    for names, values in grouped.values():
        of = f": {', '.join(names)}" if len(grouped) > 1 else ""
        blocks += _compression(values, of)
    return Section(
        name="tokenizer", title="Compressed vocabulary", blocks=blocks, missing=findings.missing,
        reading="Before they are hashed, tokens that are the same word up to case, accents and "
        "spaces get one canonical id, so that a row serves all spellings.")


def _compression(values: Mapping[str, Any], of: str) -> list[Block]:
    sizes = values["sizes"]
    bars = go.Bar(
        x=[str(size) for size in sorted(sizes)], y=[sizes[size] for size in sorted(sizes)],
        marker={"color": looks.BLUE}, hovertemplate="%{y:,} classes of %{x}<extra></extra>",
        text=[f"{sizes[size]:,}" for size in sorted(sizes)], textposition="outside",
        cliponaxis=False, textfont={"color": looks.FAINT, "size": 11})
    most = math.log10(max(sizes.values()))
    return [
        Numbers(numbers=[(f"{values['raw']:,}", f"raw ids{of}"),
                       (f"{values['canonical']:,}", "canonical ids"),
                       (f"{values['reduction']:.1%}", "fewer ids")]),
        Plot(title="How many tokens share a canonical id", height=260, half=True,
             figure=looks.figure(
                 [bars], looks.axis("tokens of a class", type="category"),
                 looks.log_axis("classes", range=[-0.3, most + 0.4]))),
        Table(title="The largest classes", code=True, head=["stands for", "#tokens", "some"],
              half=True, rows=[[looks.visible(text), f"{size:,}",
                                Cell("", chips=list(map(looks.visible, members)))]
                               for text, members, size in values["largest"]])]


Used = tuple[Subject, str, Mapping[str, Any]]  # an arm, its site, and how that table is used


def memory(material: Material) -> Section:
    """How a text uses the rows of each table."""
    findings = material.of("memory")
    tables = [(subject, site, values) for subject in material.subjects
              for site, values in findings.values.get(subject.name, {}).items()]
    blocks: list[Block] = []
    if tables:
        blocks = [*_shares(tables), _ranks(tables), _foreign(tables), _norms(tables),
                  *_caches(tables)]
    return Section(
        name="memory", title="Use of the memory", blocks=blocks, missing=findings.missing,
        keys=looks.keys({subject.name: subject for subject, _, _ in tables}.values()),
        reading="Which rows the text reads, how many n-grams share one, and how few rows a cache "
        "would have to hold. All of it follows from the row ids; the text is the one above.")


def _names(tables: Sequence[Used]) -> list[str]:
    """A name a table: its arm's, with the site where an arm has several."""
    owners = [subject.name for subject, _, _ in tables]
    return [subject.name if owners.count(subject.name) == 1 else f"{subject.name}, {site}"
            for subject, site, _ in tables]


def _shares(tables: Sequence[Used]) -> Iterator[Plot]:
    """Rows touched and n-grams that collide, a row a table, a symbol an order."""
    names = _names(tables)
    for title, words, share in (
        ("Rows that the text touches", "of an order's rows",
         lambda order: order["touched"] / order["rows"]),
        ("N-grams that share their row with another", "of distinct n-grams, a head",
         lambda order: order["collided"]),
    ):
        traces = [looks.dots(
            subject.name, Look(subject.look.light, subject.look.dark, _symbol(number)),
            [share(order)], [row], f"{of}-grams: %{{x:.1%}}")
            for row, (subject, _, values) in enumerate(tables)
            for number, (of, order) in enumerate(values["orders"].items())]
        yield Plot(title=title, height=looks.height(len(tables)), half=True,
                   note=_orders(tables),
                   figure=looks.figure(
                       traces, looks.axis(words, tickformat=".0%", range=[-0.03, 1.03]),
                       looks.rows_axis(names)))


def _symbol(number: int) -> str:
    return looks.SYMBOLS[number % len(looks.SYMBOLS)]


def _orders(tables: Sequence[Used]) -> str:
    """Which symbol is which order."""
    signs = ("\N{BLACK CIRCLE}", "\N{BLACK SQUARE}", "\N{BLACK DIAMOND}",
             "\N{BLACK UP-POINTING TRIANGLE}", "\N{MULTIPLICATION X}", "\N{BLACK STAR}")
    orders = max((list(values["orders"]) for _, _, values in tables), key=len)
    return "   ".join(f"{signs[number % len(signs)]} {order}-grams"
                      for number, order in enumerate(orders))


def _ranks(tables: Sequence[Used]) -> Plot:
    """Reads of each row by its rank, both logarithmic."""
    traces = []
    for subject, site, values in tables:
        ranks = thinned(len(values["reads_by_rank"]))
        traces.append(looks.curve(
            subject.name, subject.look, [rank + 1 for rank in ranks],
            [values["reads_by_rank"][rank] for rank in ranks],
            f"{looks.plain(site)}, rank %{{x:,}}: %{{y:,}} reads", markers=False))
    return Plot(title="Reads of a row by its rank", height=300, half=True,
                figure=looks.figure(traces, looks.log_axis("rank of the row"),
                                    looks.log_axis("reads")))


def thinned(count: int, points: int = POINTS) -> list[int]:
    """About so many ranks from 0 to count - 1, evenly on a logarithmic axis."""
    if count <= points:
        return list(range(count))
    return sorted({round(count ** (point / (points - 1))) - 1 for point in range(points)})


def _foreign(tables: Sequence[Used]) -> Plot:
    """The share of a row's reads that belongs to other n-grams, by how frequent one is."""
    traces = []
    for subject, _, values in tables:
        for number, (order, use) in enumerate(values["orders"].items()):
            bands = use["foreign_reads_by_frequency"]
            trace = looks.curve(subject.name, subject.look, _named(bands, memory_use.FREQUENCIES),
                                list(bands.values()),
                                f"{order}-grams that come %{{x}} times: %{{y:.1%}}")
            trace.line.dash = DASHES[number % len(DASHES)]
            traces.append(trace)
    return Plot(title="Reads of an n-gram's rows that are others'", height=300, half=True,
                note=_dashes(tables),
                figure=looks.figure(
                    traces, _bands_axis("times that the n-gram comes", memory_use.FREQUENCIES),
                    looks.axis("share of reads", tickformat=".0%", rangemode="tozero")))


def _named(shares: Mapping[int, float], bands: Sequence[int]) -> list[str]:
    """The names of the bands that have a share."""
    return [looks.ranges(bands)[list(bands).index(low)] for low in shares]


def _bands_axis(title: str, bands: Sequence[int]) -> dict[str, Any]:
    """An axis of bands in their order, whichever curve has which."""
    return looks.axis(title, type="category", categoryorder="array",
                      categoryarray=looks.ranges(bands))


def _dashes(tables: Sequence[Used]) -> str:
    orders = max((list(values["orders"]) for _, _, values in tables), key=len)
    words = ("solid", "dashed", "dotted", "dash-dotted")
    return ", ".join(f"{words[number % len(words)]}: {order}-grams"
                     for number, order in enumerate(orders))


def _norms(tables: Sequence[Used]) -> Plot:
    """The mean length of rows by how often they are read."""
    traces = [looks.curve(
        subject.name, subject.look, _named(values["norm_by_reads"], memory_use.READS),
        list(values["norm_by_reads"].values()),
        f"{looks.plain(site)}, read %{{x}} times: %{{y:.3g}}")
        for subject, site, values in tables]
    return Plot(title="Length of rows by how often they are read", height=300, half=True,
                figure=looks.figure(
                    traces, _bands_axis("reads in this text", memory_use.READS),
                    looks.axis("mean norm of a row", rangemode="tozero")))


def _caches(tables: Sequence[Used]) -> Iterator[Plot]:
    """Hit rates of a cache; arms that read the same n-grams share a curve."""
    curves: dict[str, tuple[list[str], str, Mapping[str, Any]]] = {}
    for name, (_, _, values) in zip(_names(tables), tables, strict=True):
        for order, use in values["orders"].items():
            rates = use["cache_hit_rates"]
            curves.setdefault(repr((order, rates)), ([], order, use))[0].append(name)
    same = len(curves) == len({order for _, order, _ in curves.values()})
    traces, keys = [], []
    for number, (names, order, use) in enumerate(curves.values()):
        said = f"{order}-grams" if same else f"{order}-grams, {', '.join(names)}"
        colour = looks.HUES[number % len(looks.HUES)]
        look = Look(colour, looks.ON_BLACK[colour])
        keys.append(Key(said, look))
        traces.append(looks.curve(said, look, use["cache_entries"], use["cache_hit_rates"],
                                  "%{x:,} n-grams: %{y:.1%} hits"))
    yield Plot(
        title="Hits of a cache by its size", height=320, keys=keys, half=True,
        note="Least recently used goes first; a cache that begins empty."
        + (" The same for all arms: they read the same n-grams." if same else ""),
        figure=looks.figure(
            traces, looks.axis("n-grams that it holds", type="log", dtick=0.60206,
                               tickformat=",d"),
            looks.axis("share of look-ups", tickformat=".0%", range=[0, 1])))
