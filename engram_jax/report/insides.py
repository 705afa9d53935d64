"""The sections that look inside trained runs: gates, layers, and what is lost without memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from engram_jax.errors import UserError
from engram_jax.report import looks
from engram_jax.report.blocks import Block, Cell, Plot, Section, Table, Tokens
from engram_jax.report.findings import Found, Material, Subject
from engram_jax.report.looks import Key

SHOWN = 10  # n-grams that open a gate most, and as many that shut it
CELLS = 144  # of a heatmap, up to which each shows its number


def largest(material: Material, names: Mapping[str, Any]) -> Subject | None:
    """Of the arms with findings the one with the largest memory, the first of equals."""
    found = [subject for subject in material.subjects if subject.name in names]
    return max(found, key=lambda subject: subject.arm.numbers.engram_params, default=None)


def gates(material: Material) -> Section:
    """Gates token by token, the n-grams at their ends, and what they follow."""
    found = material.of("gates")
    blocks: list[Block] = [*_tokens(found)]
    if chosen := largest(material, found.values):
        blocks += _extremes(chosen.name, found.values[chosen.name], folded=False)
        blocks.append(_patterns(material, found))
        for name, values in found.values.items():
            if name != chosen.name:
                blocks += _extremes(name, values, folded=True)
    return Section(
        name="gates", title="Gates", blocks=blocks, missing=found.missing,
        reading="How much of what memory found each token lets in: the darker a token, the wider "
        "its gate stands open. The shade runs from the lowest to the highest gate of what is "
        "chosen. Point at a token (or tap it) for its number.")


def _tokens(found: Found) -> list[Tokens]:
    """The texts, once for arms that cut them into the same tokens."""
    grouped: dict[str, tuple[list[list[str]], dict[str, Any]]] = {}
    for name, values in found.values.items():
        texts = [values, *values.get("examples", [])]
        pieces = [each["pieces"] for each in texts]
        layers = [{layer: each["layers"][layer] for layer in each["layers"]} for each in texts]
        gates_of = {str(layer): [_rounded(each[layer]) for each in layers] for layer in layers[0]}
        grouped.setdefault(repr(pieces), (pieces, {}))[1][name] = gates_of
    return [Tokens(title="Gates of each token", pieces=pieces, gates=gates_of)
            for pieces, gates_of in grouped.values()]


def _rounded(of_layer: Any) -> list[list[float]]:
    """Gates [T][M], whether alone or among a layer's other findings."""
    gate_TM = of_layer["gates"] if isinstance(of_layer, Mapping) else of_layer
    return [[round(float(gate), 3) for gate in token] for token in gate_TM]


def _extremes(name: str, values: Mapping[str, Any], folded: bool) -> list[Table]:
    return [_ngrams(f"{which} most: {name}, before block {layer}", of_layer[key][:SHOWN], folded)
            for layer, of_layer in values["layers"].items()
            for which, key in (("Open", "highest"), ("Shut", "lowest")) if of_layer[key]]


def _ngrams(title: str, ngrams: Sequence[tuple[str, float, int]], folded: bool) -> Table:
    return Table(title=title, folded=folded, code=True, half=True,
                 head=["n-gram", "#gate at its end", "#times"],
                 rows=[[text, Cell(f"{gate:.3f}", bar=gate), f"{times:,}"]
                       for text, gate, times in ngrams])


def _patterns(material: Material, found: Found) -> Plot:
    """The correlation of each branch's gate with how sure the model was, a row an arm and layer."""
    rows = [(subject, layer, of_layer["pattern_correlation"])
            for subject in material.subjects if subject.name in found.values
            for layer, of_layer in found.values[subject.name]["layers"].items()]
    several = len({layer for _, layer, _ in rows}) > 1
    traces: list[Any] = []
    for number, (subject, layer, correlations) in enumerate(rows):
        traces.append(go.Scatter(
            x=[0, max(correlations, key=abs)], y=[number, number], mode="lines", hoverinfo="skip",
            line={"color": looks.GRID, "width": 5}, meta=subject.name))
        traces.append(looks.dots(
            subject.name, subject.look, correlations, [number] * len(correlations),
            f"block {layer}, branch %{{customdata}}: %{{x:+.3f}}",
            customdata=list(range(len(correlations)))))
    names = [f"{subject.name}, block {layer}" if several else subject.name
             for subject, layer, _ in rows]
    return Plot(
        title="Gates and completed patterns", height=76 + looks.ROW * len(rows),
        figure=looks.figure(traces, looks.axis("correlation", rangemode="tozero", zeroline=True,
                                               zerolinecolor=looks.FAINT), looks.rows_axis(names)),
        note="The correlation of the gate at a token with the probability that the model gave that "
        "token beforehand, a dot a branch. Above 0 the gate opens where a pattern completes.")


def lens(material: Material) -> Section:
    """How early a layer's prediction is the last one's."""
    found = material.of("lens")
    chosen = [subject for subject in material.subjects if subject.name in found.values]
    traces = [looks.curve(subject.name, subject.look, list(range(len(values))), values,
                          "block %{x}: %{y:.4g} nats")
              for subject in chosen for values in [found.values[subject.name]]]
    plots = [Plot(
        title="Divergence from the last block's prediction", height=340,
        keys=[Key(subject.name, subject.look) for subject in chosen],
        figure=looks.figure(traces, looks.axis("block", dtick=_step(found.values.values())),
                            looks.axis("KL divergence, nats", rangemode="tozero")))]
    return Section(
        name="lens", title="LogitLens", blocks=plots if traces else [], missing=found.missing,
        reading="Each block's state is read off as if it were the last one's: the lower a curve, "
        "the nearer that block is to what the model says in the end, where it is 0. A curve that "
        "falls earlier is a model that is ready earlier.")


def _step(values: Any) -> int:
    """Between ticks at whole blocks."""
    return max(1, max((len(each) for each in values), default=1) // 10)


def cka(material: Material) -> Section:
    """How alike the layers of the first arm and of the largest memory are."""
    first = material.subjects[0]
    other = largest(material, {subject.name: None for subject in material.subjects}) or first
    section = Section(
        name="cka", title="Likeness of layers (CKA)", blocks=[],
        reading=f"How alike each block's state in {other.name} is to each block's in {first.name}: "
        "1 is the same up to rotation and scale. The line is the soft alignment, the block of "
        f"{first.name} that a block of {other.name} is most like; where it lies above the "
        "diagonal, memory has made the model deeper than it is.")
    try:
        found = material.pair(first, other)
    except UserError as error:
        return Section(**{**vars(section), "missing": [str(error)]})
    return Section(**{**vars(section), "blocks": [_heatmap(found, first.name, other.name)]})


def _heatmap(found: Mapping[str, Any], first: str, other: str) -> Plot:
    matrix = found["cka"]
    depth, other_depth = len(matrix), len(matrix[0])
    traces: list[Any] = [go.Heatmap(
        z=matrix, zmin=0, zmax=1, xgap=2, ygap=2,
        colorscale=[[0, looks.GRID], [0.5, looks.SKY], [1, looks.BLUE]],
        texttemplate="%{z:.2f}" if depth * other_depth <= CELLS else "", textfont={"size": 12},
        hovertemplate=f"{looks.plain(other)} block %{{x}}<br>{looks.plain(first)} block %{{y}}<br>"
        "CKA %{z:.3f}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"color": looks.FAINT},
                  "title": {"text": "CKA", "font": {"color": looks.FAINT}}})]
    traces.append(go.Scatter(
        x=list(range(other_depth)), y=found["soft_alignment"], mode="lines+markers",
        line={"color": looks.ORANGE, "width": 2.2}, marker={"color": looks.ORANGE, "size": 7},
        hovertemplate="block %{x} is like block %{y:.2f}<extra></extra>"))
    traces.append(go.Scatter(
        x=[0, min(depth, other_depth) - 1], y=[0, min(depth, other_depth) - 1], mode="lines",
        hoverinfo="skip", line={"color": looks.INK, "width": 1, "dash": "dot"}))
    return Plot(
        title="CKA, with the soft alignment in orange", height=min(620, 150 + 70 * depth),
        figure=looks.figure(
            traces, looks.axis(f"block of {looks.shortened(other)}", dtick=1, showgrid=False),
            looks.axis(f"block of {looks.shortened(first)}", dtick=1, showgrid=False)))


def suppression(material: Material) -> Section:
    """Losses with memory and without, by kind of token."""
    found = material.of("suppression")
    bare = [subject.name for subject in material.subjects
            if subject.name in found.values and not subject.keys]
    values = {name: groups for name, groups in found.values.items() if name not in bare}
    missing = [*found.missing, *(f"{name}: has no memory to take away" for name in bare)]
    blocks: list[Block] = []
    if chosen := largest(material, values):
        for group in dict.fromkeys(group for groups in values.values() for group in groups):
            blocks += _of_group(material, group, chosen, values)
    return Section(
        name="suppression", title="Memory taken away", blocks=blocks, missing=missing,
        reading="The same run with every row set to zero: what it loses is what it left to its "
        "memory. A model trained with memory is not one trained without, so this says where memory "
        "is used and not what it is worth.")


GROUPS = {"classes": "class of token", "ngram_frequency": "how often its n-gram comes in the text",
          "context": "position in the text", "tasks": "task"}


def _of_group(
    material: Material, group: str, chosen: Subject, values: Mapping[str, Any]
) -> list[Block]:
    """The largest memory's losses, and what every memory arm loses."""
    told = GROUPS.get(group, group.replace("_", " "))
    with_it = {name: groups[group] for name, groups in values.items() if group in groups}
    kinds = list(dict.fromkeys(kind for of_kind in with_it.values() for kind in of_kind))
    subjects = [subject for subject in material.subjects if subject.name in with_it]
    blocks: list[Block] = []
    if chosen.name in with_it:
        blocks.append(_dumbbells(f"Loss by {told}: {chosen.name}", chosen, with_it[chosen.name]))
    if len(subjects) > 1:
        traces = [looks.dots(
            subject.name, subject.look,
            [kept["suppressed"] - kept["loss"] for kept in of_kind.values()],
            [kinds.index(kind) for kind in of_kind], "%{x:+.3f} nats a token without memory",
            marker={"size": 9}) for subject in subjects for of_kind in [with_it[subject.name]]]
        blocks.append(Plot(
            title=f"Loss that memory spares, by {told}", height=76 + 30 * len(kinds), half=True,
            keys=[Key(subject.name, subject.look) for subject in subjects],
            figure=looks.figure(traces, looks.axis("nats a token", rangemode="tozero"),
                                looks.rows_axis(kinds))))
    return blocks


def _dumbbells(title: str, subject: Subject, of_kind: Mapping[str, Any]) -> Plot:
    """A row a kind: the loss with memory, a line, and the loss without."""
    traces: list[Any] = []
    for row, kept in enumerate(of_kind.values()):
        traces.append(go.Scatter(
            x=[kept["loss"], kept["suppressed"]], y=[row, row], mode="lines", hoverinfo="skip",
            line={"color": looks.GRID, "width": 5}))
    rows = list(range(len(of_kind)))
    without = looks.Look(looks.GREY, looks.ON_BLACK[looks.GREY], "circle-open")
    for name, look, key in (("with memory", subject.look, "loss"),
                            ("without", without, "suppressed")):
        traces.append(looks.dots(
            name, look, [kept[key] for kept in of_kind.values()], rows,
            "%{x:.3f} nats a token<br>%{customdata}",
            customdata=[f"{kept['tokens']:,} tokens" for kept in of_kind.values()],
            marker={"line": {"width": 2}} if key == "suppressed" else {}))
    return Plot(title=title, half=True, height=76 + 30 * len(of_kind),
                keys=[Key("with memory", subject.look), Key("without", without)],
                figure=looks.figure(traces, looks.axis("nats a token"),
                                    looks.rows_axis(list(of_kind))))


def patchscope(material: Material) -> Section:
    """What each model says of its own states."""
    found = material.of("patchscope")
    depth = max(map(len, found.values.values()), default=0)
    head = ["block", *found.values]
    rows = [[str(layer), *(values[layer] if layer < len(values) else "-"
                           for values in found.values.values())] for layer in range(depth)]
    of = material.prompt(material.subjects[0]) if material.text else ""
    table = Table(title="What the state behind the last token says", head=head, rows=rows,
                  code=True, note=f"The text: \N{LEFT DOUBLE QUOTATION MARK}{of}"
                  "\N{RIGHT DOUBLE QUOTATION MARK}")
    return Section(
        name="patchscope", title="PatchScope", blocks=[table] if rows else [],
        missing=found.missing,
        reading="Each block's state behind a text's last token is put into a prompt that asks the "
        "model to repeat what stands there. A large model that has made sense of the words says "
        "so from some block on; small ones go on as they always do.")


SECTIONS: tuple[Callable[[Material], Section], ...] = (
    gates, lens, cka, suppression, patchscope)
