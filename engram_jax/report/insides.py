"""The sections that look inside trained runs: gates, layers, and what is lost without memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from engram_jax.errors import UserError
from engram_jax.report import looks
from engram_jax.report.blocks import Block, Cell, Group, Plot, Section, Table, Tokens
from engram_jax.report.findings import Findings, Material, Subject

SHOWN = 10  # n-grams that open a gate most, and as many that shut it
CELLS = 144  # of a heatmap, up to which each shows its number


def gates(material: Material) -> Section:
    """Gates token by token, the n-grams at their ends, and what they follow."""
    findings = material.of("gates")
    blocks: list[Block] = []
    if findings.values:
        chosen = material.largest(findings.values).name
        others = [name for name in findings.values if name != chosen]
        tables = {name: _extremes(name, values) for name, values in findings.values.items()}
        blocks = [*_tokens(findings, chosen), *tables[chosen], _patterns(material, findings)]
        if others:
            blocks.append(Group(title="N-grams that open and shut the gates of the other arms",
                                blocks=[table for name in others for table in tables[name]]))
    return Section(
        name="gates", title="Gates", blocks=blocks, missing=findings.missing,
        reading="How much of what memory found each token lets in: the darker a token, the wider "
        "its gate stands open. The shade runs from the lowest to the highest gate of what is "
        "chosen. Point at a token (or tap it) for its number.")


def _tokens(findings: Findings, chosen: str) -> list[Tokens]:
    """The texts, once for arms that cut them into the same tokens."""
    grouped: dict[str, tuple[list[list[str]], dict[str, Any]]] = {}
    for name, values in findings.values.items():
        texts = [values, *values.get("examples", [])]
        pieces = [[piece.replace("\n", f"{looks.RETURN}\n") for piece in each["pieces"]]
                  for each in texts]
        layers = [{layer: each["layers"][layer] for layer in each["layers"]} for each in texts]
        gates_of = {str(layer): [_rounded(each[layer]) for each in layers] for layer in layers[0]}
        grouped.setdefault(repr(pieces), (pieces, {}))[1][name] = gates_of
    return [Tokens(title="Gates of each token", pieces=pieces, gates=gates_of,
                   chosen=chosen if chosen in gates_of else next(iter(gates_of)))
            for pieces, gates_of in grouped.values()]


def _rounded(of_layer: Any) -> list[list[float]]:
    """Gates [T][M], whether alone or among a layer's other findings."""
    gate_TM = of_layer["gates"] if isinstance(of_layer, Mapping) else of_layer
    return [[round(float(gate), 3) for gate in token] for token in gate_TM]


def _extremes(name: str, values: Mapping[str, Any]) -> list[Table]:
    return [_ngrams(f"{which} most: {name}, before block {layer}", of_layer[key][:SHOWN])
            for layer, of_layer in values["layers"].items()
            for which, key in (("Open", "highest"), ("Shut", "lowest")) if of_layer[key]]


def _ngrams(title: str, ngrams: Sequence[tuple[str, float, int]]) -> Table:
    return Table(title=title, code=True, half=True,
                 head=["n-gram", "#gate at its end", "#times"],
                 rows=[[looks.visible(text), Cell(f"{gate:.3f}", bar=gate), f"{times:,}"]
                       for text, gate, times in ngrams])


def _patterns(material: Material, findings: Findings) -> Plot:
    """The correlation of each branch's gate with how sure the model was, a row an arm and layer."""
    rows = [(subject, layer, of_layer["pattern_correlation"])
            for subject in material.subjects if subject.name in findings.values
            for layer, of_layer in findings.values[subject.name]["layers"].items()]
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
        title="Gates and completed patterns", height=looks.height(len(rows)),
        figure=looks.figure(traces, looks.axis("correlation", rangemode="tozero", zeroline=True,
                                               zerolinecolor=looks.FAINT), looks.rows_axis(names)),
        note="The correlation of the gate at a token with the probability that the model gave that "
        "token beforehand, a dot a branch. Above 0 the gate opens where a pattern completes.")


def lens(material: Material) -> Section:
    """How early a layer's prediction is the last one's."""
    findings = material.of("lens")
    chosen = [subject for subject in material.subjects if subject.name in findings.values]
    traces = [looks.curve(subject.name, subject.look, list(range(len(values))), values,
                          "block %{x}: %{y:.4g} nats")
              for subject in chosen for values in [findings.values[subject.name]]]
    plots = [Plot(
        title="Divergence from the last block's prediction", height=340,
        keys=looks.keys(chosen),
        figure=looks.figure(traces, looks.axis("block", dtick=_step(findings.values.values())),
                            looks.axis("KL divergence, nats", rangemode="tozero")))]
    return Section(
        name="lens", title="LogitLens", blocks=plots if traces else [], missing=findings.missing,
        reading="Each block's state is read off as if it were the last one's: the lower a curve, "
        "the nearer that block is to what the model says in the end, where it is 0. A curve that "
        "falls earlier is a model that is ready earlier.")


def _step(values: Any) -> int:
    """Between ticks at whole blocks."""
    return max(1, max((len(each) for each in values), default=1) // 10)


def cka(material: Material) -> Section:
    """How alike the layers of the first arm are to its own and to those of the largest memory."""
    first, other = material.subjects[0], material.largest()
    seeds = {subject.opened.run.training.seed for subject in (first, other) if subject.opened}
    alike = (" Both runs began with the same numbers where their shapes agree, which alone makes "
             "them alike." if other is not first and len(seeds) == 1 else "")
    blocks, missing = [], []
    for second in (first, other) if other is not first else (first,):
        try:
            blocks.append(_heatmap(material.pair(first, second), first.name, second.name))
        except UserError as error:
            missing.append(f"{second.name}: {error}")
    return Section(
        name="cka", title="Likeness of layers (CKA)", blocks=blocks, missing=missing,
        reading=f"How alike the state after each block of {first.name} (upwards) is to that after "
        "each block of the other run (to the right): 1 is the same up to rotation and scale. The "
        "line is the soft alignment, the mean of the (up to five) blocks that a block is most "
        "like. Where it lies above the line of the run with itself, the other run is ahead, as if "
        f"it were deeper than it is.{alike}")


def _heatmap(likeness: Mapping[str, Any], first: str, other: str) -> Plot:
    matrix = likeness["cka"]
    depth, other_depth = len(matrix), len(matrix[0])
    heat = go.Heatmap(
        z=matrix, zmin=0, zmax=1, xgap=2, ygap=2, showscale=depth * other_depth > CELLS,
        colorscale=[[0, looks.GRID], [1, looks.BLUE]],
        hovertemplate=f"{looks.plain(other)}, block %{{x}}<br>{looks.plain(first)}, block %{{y}}"
        "<br>CKA %{z:.3f}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"color": looks.FAINT}})
    alignment = go.Scatter(
        x=list(range(other_depth)), y=likeness["soft_alignment"], mode="lines+markers",
        line={"color": looks.ORANGE, "width": 2.2}, marker={"color": looks.ORANGE, "size": 7},
        hovertemplate="block %{x} is like block %{y:.2f}<extra></extra>")
    ends = [0, min(depth, other_depth) - 1]
    diagonal = go.Scatter(x=ends, y=ends, mode="lines", hoverinfo="skip",
                          line={"color": looks.INK, "width": 1, "dash": "dot"})
    title = f"{first} and itself" if first == other else f"{first} and {other}"
    return Plot(
        title=title, height=min(560, 180 + 60 * depth), half=True, note=_compared(likeness),
        figure=looks.figure(
            [heat, diagonal, alignment],
            looks.axis(f"block of {looks.shortened(other)}", dtick=_step(matrix), showgrid=False),
            looks.axis(f"block of {looks.shortened(first)}", dtick=_step(matrix), showgrid=False),
            annotations=_cells(matrix)))


def _compared(likeness: Mapping[str, Any]) -> str:
    examples = f"{likeness['examples']:,} positions: " if "examples" in likeness else ""
    return f"Orange: soft alignment. {examples}{likeness.get('positions', '')}".strip()


def _cells(matrix: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Each cell's number, in its corner: lines run through its middle. None in a large matrix."""
    if len(matrix) * len(matrix[0]) > CELLS:
        return []
    return [{"x": x - 0.46, "y": y + 0.34, "xanchor": "left", "text": f"{value:.2f}",
             "showarrow": False,
             "font": {"size": 12, "color": looks.SURFACE if value > 0.65 else looks.INK}}
            for y, row in enumerate(matrix) for x, value in enumerate(row)]


def suppression(material: Material) -> Section:
    """Losses with memory and without, by kind of token."""
    findings = material.of("suppression")
    blocks: list[Block] = []
    if findings.values:
        chosen = material.largest(findings.values).name
        for group in dict.fromkeys(name for groups in findings.values.values() for name in groups):
            blocks += _of_group(material, group, chosen, findings.values)
    several = [subject for subject in material.subjects if subject.name in findings.values]
    return Section(
        name="suppression", title="Memory taken away", blocks=blocks, missing=findings.missing,
        keys=looks.keys(several) if len(several) > 1 else (),
        reading="The same run with every row set to zero: what it loses is what it left to its "
        "memory. A model trained with memory is not one trained without, so this says where memory "
        "is used and not what it is worth.")


GROUPS = {"classes": "class of token", "ngram_frequency": "frequency of the n-gram before it",
          "context": "what the sequence showed", "tasks": "task"}


def _of_group(
    material: Material, group: str, chosen: str, values: Mapping[str, Any]
) -> list[Block]:
    """The largest memory's losses, and what every arm with a memory loses."""
    told = GROUPS.get(group, group.replace("_", " "))
    with_it = {name: groups[group] for name, groups in values.items() if group in groups}
    kinds = list(dict.fromkeys(kind for of_kind in with_it.values() for kind in of_kind))
    subjects = [subject for subject in material.subjects if subject.name in with_it]
    blocks: list[Block] = [
        _dumbbells(f"Loss by {told}", subject, with_it[chosen], kinds)
        for subject in subjects if subject.name == chosen]
    if len(subjects) > 1:
        traces = [looks.dots(
            subject.name, subject.look,
            [kept["suppressed"] - kept["loss"] for kept in of_kind.values()],
            [kinds.index(kind) for kind in of_kind], "%{x:+.3f} nats a token",
            marker={"size": 9}) for subject in subjects for of_kind in [with_it[subject.name]]]
        blocks.append(Plot(
            title="What the loss rises by, all arms", height=looks.height(len(kinds)), half=True,
            note="Right of 0 memory helps.",
            figure=looks.figure(
                traces, looks.axis("nats a token", rangemode="tozero", zeroline=True,
                                   zerolinecolor=looks.FAINT),
                looks.rows_axis(_kind_names(kinds)))))
    return blocks


def _kind_names(kinds: Sequence[str]) -> list[str]:
    """Kinds as a plot shows them: bands by their ends."""
    lows = [kind.strip().removesuffix("+").replace(",", "") for kind in kinds]
    bands = [int(low) for low in lows if low.isdecimal()]
    others = [kind for kind, low in zip(kinds, lows, strict=True) if not low.isdecimal()]
    return [*(looks.ranges(bands) if bands else []), *others]


def _dumbbells(
    title: str, subject: Subject, of_kind: Mapping[str, Any], kinds: Sequence[str]
) -> Plot:
    """A row a kind: the loss with memory, a line, and the loss without."""
    traces: list[Any] = []
    rows = [kinds.index(kind) for kind in of_kind]
    for row, kept in zip(rows, of_kind.values(), strict=True):
        traces.append(go.Scatter(
            x=[kept["loss"], kept["suppressed"]], y=[row, row], mode="lines", hoverinfo="skip",
            line={"color": looks.GRID, "width": 5}))
    without = looks.Look(looks.GREY, looks.ON_BLACK[looks.GREY], "circle-open")
    for name, look, key in (("with memory", subject.look, "loss"),
                            ("without", without, "suppressed")):
        traces.append(looks.dots(
            name, look, [kept[key] for kept in of_kind.values()], rows,
            "%{x:.3f} nats a token<br>%{customdata}",
            customdata=[f"{kept['tokens']:,} tokens" for kept in of_kind.values()],
            marker={"line": {"width": 2}} if key == "suppressed" else {}))
    return Plot(title=title, half=True, height=looks.height(len(kinds)),
                note=f"{subject.name}. Filled: with memory, ring: without.",
                figure=looks.figure(traces, looks.axis("nats a token"),
                                    looks.rows_axis(_kind_names(kinds))))


def patchscope(material: Material) -> Section:
    """What each model says of its own states."""
    first, other = material.subjects[0], material.largest()
    findings = material.of("patchscope", [first, other] if other is not first else [first])
    depth = max(map(len, findings.values.values()), default=0)
    head = ["block", *findings.values]
    rows = [[str(layer), *(values[layer].replace("\n", looks.RETURN) if layer < len(values) else "-"
                           for values in findings.values.values())] for layer in range(depth)]
    of = material.prompt(first.opened) if material.text and first.opened else ""
    table = Table(title="What the state behind the last token says", head=head, rows=rows,
                  code=True, note=f"The text: \N{LEFT DOUBLE QUOTATION MARK}{of}"
                  "\N{RIGHT DOUBLE QUOTATION MARK}")
    return Section(
        name="patchscope", title="PatchScope", blocks=[table] if rows else [],
        missing=findings.missing,
        reading="Each block's state behind a text's last token is put into a prompt that asks the "
        "model to repeat what stands there. A large model that has made sense of the words says "
        "so from some block on; small ones go on as they always do.")

