"""The sections that runs' records alone tell: outcomes, curves, and what everything costs."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from engram_jax.costs.accounting import short
from engram_jax.report import looks
from engram_jax.report.blocks import Cell, Plot, Section, Table
from engram_jax.report.findings import Material, Subject
from engram_jax.report.looks import Key, Look, signed
from engram_jax.results import comparing
from engram_jax.results.comparing import Arm, Run
from engram_jax.results.statistics import Interval, interval
from engram_jax.runs.directory import RunDirectory

METRICS = (  # of metrics.jsonl: name, title, unit
    ("learning/loss", "Training loss", "nats a token"),
    ("evaluation/loss", "Validation loss", "nats a token"),
    ("learning/current_learning_rate", "Learning rate", "of the backbone"),
    ("engram/gate_mean", "Mean gate", "0 shut, 1 open"),
    ("engram/unique_share", "Distinct among the row ids of a batch", "share"),
    ("moe/max_load_over_mean", "Load of the busiest expert", "times the mean"),
)
PARTS = {  # of `accounting.parts`: its colour; tables have their own, what is not here is "rest"
    "attention": looks.PURPLE, "dense FFN": looks.SKY, "shared experts": looks.GREEN,
    "routed experts": looks.BLUE, "engram fusion": looks.ORANGE,
    "over-encoding projections": looks.YELLOW, "LM head": looks.GREY}
TABLES, REST = "memory tables", "norms, routers and the rest"
BESIDE = {"l": 8, "r": 52, "t": 10, "b": 8}  # pixels: room for numbers at the ends of bars
# Fields on which depends what a seed's batches hold.
BATCHES = (comparing.TEXT, "data.tokenizer", "data.sequence_length", "data.batch_size")
STEP = "step %{x:,}: %{y:.4g}"

Curves = Mapping[str, Sequence[tuple[int, float]]]  # metric -> (step, value)


def outcomes(material: Material) -> Section:
    """The arms in a table, and their losses."""
    arms = material.arms
    done = [subject for subject in material.subjects if subject.arm.mean("loss")]
    plots = [_losses(done)] if done else []
    if by_slots := _by_slots(done):
        plots.append(by_slots)
    missing = [f"{run.path.name} is not done: step {run.step:,} of {run.config.training.steps:,}"
               for arm in arms for run in arm.unfinished]
    reading = ("One line an arm: runs that differ in nothing but their seeds. Loss is on "
               "validation text, in nats a token; lower is better.")
    if len(arms) > 1:
        reading += (f" The difference is from {arms[0].name} at equal seeds; ranges are 95 % "
                    "intervals over seeds (Student's t).")
    return Section(name="runs", title="Runs", reading=reading, blocks=[_table(material), *plots],
                   missing=missing)


def _table(material: Material) -> Table:
    names = comparing.differing(material.arms)
    first = material.arms[0]
    head = ["arm", "#loss", "#difference", "#bits a byte", "#tokens/s", "#parameters", "#active",
            "#in tables", "#FLOPs a token", "#tokens", *comparing.headings(names)]
    rows = [[Cell(subject.name, small=_state(subject.arm), look=subject.look),
             *_numbers(subject.arm, first),
             *(comparing.word(subject.arm.fields[name]) if name in subject.arm.fields else "-"
               for name in names)] for subject in material.subjects]
    return Table(title="", head=head, rows=rows)


def _state(arm: Arm) -> str:
    done, open_ = len(arm.values("loss")), len(arm.unfinished)
    said = f"{done} seed{'s' * (done != 1)}" if done else "no run done"
    return f"{said}, {open_} not done" if open_ and done else said


def _numbers(arm: Arm, first: Arm) -> list[Cell | str]:
    sizes, data = arm.numbers, arm.runs[0].config
    tokens = data.training.steps * data.data.batch_size * data.data.sequence_length
    counts = [short(count) for count in (sizes.total_params, sizes.active_params,
                                         sizes.engram_params, sizes.flops_per_token, tokens)]
    loss, bits, speed = (arm.mean(name) for name in ("loss", "bits_per_byte", "tokens_per_s"))
    if loss is None or bits is None or speed is None:
        return [*["-"] * 4, *counts]
    gap = arm.against(first)
    return [Cell(f"{loss.mean:.4f}", small=ends(loss, "{:.3f}".format)),
            Cell(signed(gap.mean, 4), small=ends(gap, signed)) if gap else "-",
            f"{bits.mean:.4f}", f"{speed.mean:,.0f}", *counts]


def ends(spread: Interval, said: Any) -> str:
    """An interval's ends as words; nothing for one value."""
    if spread.low is None or spread.high is None:
        return ""
    return f"{said(spread.low)} to {said(spread.high)}"


def _losses(done: Sequence[Subject]) -> Plot:
    """Each arm's mean, interval and seeds, a row each."""
    traces = []
    for row, subject in enumerate(done):
        values = subject.arm.values("loss")
        spread = interval(values.values())
        said = ends(spread, "{:.4f}".format)
        if len(values) > 1:
            traces.append(looks.dots(
                subject.name, subject.look, list(values.values()), [row] * len(values),
                "seed %{customdata}: %{x:.4f} nats a token", marker={"size": 7, "opacity": 0.45},
                customdata=[seed for _, seed in values]))
        traces.append(looks.dots(subject.name, subject.look, [spread.mean], [row],
                                 "%{x:.4f} nats a token" + (f"<br>95 % {said}" if said else ""),
                                 intervals=[spread]))
    return Plot(title="Validation loss by arm", height=looks.height(len(done)),
                figure=looks.figure(traces, looks.axis("nats a token", tickformat=".2f"),
                                    looks.rows_axis([subject.name for subject in done])),
                note="Dots are means, pale dots single seeds, bars 95 % intervals."
                if any(len(subject.arm.values("loss")) > 1 for subject in done) else "")


def _by_slots(done: Sequence[Subject]) -> Plot | None:
    """Loss against slots, a line a kind of memory; None where arms do not differ in slots, or in
    more than that."""
    kinds: dict[str, list[Subject]] = collections.defaultdict(list)
    for subject in done:
        kinds[looks.memory_kind(subject.arm.runs[0].config)].append(subject)
    bare = kinds.pop("no memory", [])
    sizes = [{_slots(subject) for subject in alike} for alike in kinds.values()]
    if not any(len(each) > 1 for each in sizes) or not all(map(_only_slots, kinds.values())):
        return None
    traces: list[Any] = [_line(kind, sorted(alike, key=_slots)) for kind, alike in kinds.items()]
    everywhere = sorted(set().union(*sizes))
    for subject in bare[:1]:
        mean = interval(subject.arm.values("loss").values()).mean
        traces.append(looks.curve(
            subject.name, subject.look, [everywhere[0] / 1.6, everywhere[-1] * 1.6], [mean, mean],
            "%{y:.4f} nats a token"))
        # Its unseen points keep the name off the line.
        traces[-1].update(line_dash="dash", marker_opacity=0, marker_size=12)
        _named(traces[-1])
    return Plot(
        title="Loss against the size of the memory", height=340,
        figure=looks.figure(
            traces, looks.axis("slots (rows of one head's table)", type="log",
                               tickvals=everywhere, ticktext=[f"{size:,}" for size in everywhere]),
            looks.axis("nats a token", tickformat=".2f")))


def _only_slots(subjects: Sequence[Subject]) -> bool:
    """Whether arms differ in nothing else."""
    names = comparing.differing([subject.arm for subject in subjects])
    return all(name.endswith(".rows_per_head") for name in names)


def _slots(subject: Subject) -> int:
    return looks.slots(subject.arm.runs[0].config)


def _line(kind: str, subjects: Sequence[Subject]) -> go.Scatter:
    look = subjects[-1].look if len(subjects) < 2 else subjects[len(subjects) // 2].look
    means = [interval(subject.arm.values("loss").values()) for subject in subjects]
    line = _named(looks.curve(kind, look, [_slots(subject) for subject in subjects],
                       [mean.mean for mean in means], "%{x:,} slots: %{y:.4f} nats a token"))
    if any(mean.low is not None for mean in means):
        line.error_y = {"type": "data", "thickness": 1.3, "width": 4, "color": look.light,
                        "array": [(mean.high or mean.mean) - mean.mean for mean in means]}
    return line


def _named(line: go.Scatter) -> go.Scatter:
    """The line with its name at its first point."""
    line.update(mode=f"{line.mode}+text", text=[looks.plain(line.name), *[""] * (len(line.x) - 1)],
                textposition="top right", cliponaxis=False,
                textfont={"color": line.line.color, "size": 12.5, "weight": 600})
    return line


def curves(material: Material) -> Section:
    """What was logged while the runs were trained."""
    read = [(subject, [(run, _curves(run)) for run in subject.arm.runs])
            for subject in material.subjects]
    plots, missing = [], []
    for name, title, unit in METRICS:
        traces = [looks.curve(subject.name, subject.look, *_columns(curves[name]),
                              _of_seed(run, len(runs)) + STEP, markers=len(runs) == 1,
                              opacity=1 if len(runs) == 1 else 0.6)
                  for subject, runs in read for run, curves in runs if len(curves[name]) > 1]
        if not traces:
            missing.append(f"{title}: not logged more than once in any run")
            continue
        plots.append(_over_steps(title, unit, traces))
        if name == "learning/loss" and (gaps := _gaps(read)):
            plots.append(_over_steps(f"Training loss less that of {read[0][0].name}",
                                     "nats a token, same batches", gaps))
    return Section(
        name="curves", title="Training", blocks=plots, missing=missing,
        keys=looks.keys(material.subjects),
        reading="What was logged on the way, a line a run. Equal seeds read the same batches in "
        "the same order, so differences between arms are steadier than the curves themselves. "
        "Press a name to hide its lines.")


def _over_steps(title: str, unit: str, traces: Sequence[Any]) -> Plot:
    return Plot(title=title, half=True, height=260,
                figure=looks.figure(traces, looks.axis("step"), looks.axis(unit)))


def _of_seed(run: Run, seeds: int) -> str:
    return f"seed {run.config.training.seed}, " if seeds > 1 else ""


def _curves(run: Run) -> Curves:
    curves: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for row in RunDirectory(run.path).metrics():
        for name, value in row.items():
            curves[name].append((row["step"], value))
    return curves


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _gaps(read: Sequence[tuple[Subject, Sequence[tuple[Run, Curves]]]]) -> list[go.Scatter]:
    """The mean over seeds of the training loss less the first arm's at the same step, of each arm
    that read the same batches."""
    bare = {run.seed: dict(curves["learning/loss"]) for run, curves in read[0][1]}
    traces = []
    for subject, runs in read[1:]:
        if any(subject.arm.fields[name] != read[0][0].arm.fields[name] for name in BATCHES):
            continue
        gaps: dict[int, list[float]] = collections.defaultdict(list)
        for run, curves in runs:
            for step, loss in curves["learning/loss"]:
                if step in bare.get(run.seed, {}):
                    gaps[step].append(loss - bare[run.seed][step])
        if gaps:
            means = [sum(values) / len(values) for values in gaps.values()]
            traces.append(looks.curve(subject.name, subject.look, list(gaps), means,
                                      "step %{x:,}: %{y:+.4f}"))
    return traces


def costs(material: Material) -> Section:
    """Parameters by part, those that a token meets, and FLOPs."""
    arms = material.arms
    return Section(
        name="costs", title="Parameters and FLOPs",
        reading="What each arm stores, and what one token meets of it: a token reads a few rows of "
        "a table, however large. The token embedding is counted nowhere, the LM head in the total "
        "alone; FLOPs are of training, forward and backward.",
        blocks=[_stacked("All parameters", arms, "total"),
                _stacked("Parameters that a token meets", arms, "active"), _flops(material)])


def _flops(material: Material) -> Plot:
    counts = [subject.arm.numbers.flops_per_token for subject in material.subjects]
    bars = [go.Bar(x=[count], y=[row], orientation="h", marker={"color": subject.look.light},
                   hovertemplate=f"{looks.plain(subject.name)}<br>%{{x:,}}<extra></extra>")
            for row, (subject, count) in enumerate(zip(material.subjects, counts, strict=True))]
    return Plot(title="FLOPs a token", height=looks.height(len(counts)), figure=looks.figure(
        [*bars, _told(counts)],
        looks.axis("FLOPs", range=[0, max(counts) * 1.02], tickformat="~s"),
        looks.rows_axis([subject.name for subject in material.subjects]), barmode="overlay",
        margin=BESIDE))


def _told(counts: Sequence[int]) -> go.Scatter:
    """Numbers at the ends of bars, a row each."""
    return go.Scatter(
        x=list(counts), y=list(range(len(counts))), mode="text", hoverinfo="skip",
        text=[f" {short(count)}" for count in counts], textposition="middle right",
        textfont={"size": 11.5, "color": looks.FAINT}, cliponaxis=False)


def _stacked(title: str, arms: Sequence[Arm], which: str) -> Plot:
    sums = [_parts(arm, which) for arm in arms]
    colours = {**PARTS, TABLES: looks.AMBER, REST: looks.INK}
    kinds = [kind for kind in colours if any(own[kind] for own in sums)]
    traces: list[Any] = [go.Bar(
        x=[own[kind] for own in sums], y=list(range(len(arms))), orientation="h", meta=kind,
        name=kind, marker={"color": colours[kind], "line": {"width": 0}},
        hovertemplate=f"%{{customdata}}<br>{kind} %{{x:.4s}}<extra></extra>",
        customdata=[looks.plain(arm.name) for arm in arms]) for kind in kinds]
    totals = [sum(own.values()) for own in sums]
    keys = [Key(kind, Look(colours[kind], looks.ON_BLACK[colours[kind]])) for kind in kinds]
    return Plot(title=title, height=looks.height(len(arms)), keys=keys, figure=looks.figure(
        [*traces, _told(totals)],
        looks.axis("parameters", range=[0, max(totals) * 1.02], tickformat="~s"),
        looks.rows_axis([arm.name for arm in arms]), barmode="stack", margin=BESIDE))


def _parts(arm: Arm, which: str) -> collections.Counter[str]:
    """Parameters by the kinds that are drawn."""
    left_out = ["token embedding", *(["LM head"] if which == "active" else [])]
    sums: collections.Counter[str] = collections.Counter()
    for kind, part in arm.numbers.parts.items():
        if kind not in left_out:
            drawn = TABLES if kind.startswith("table ") else kind if kind in PARTS else REST
            sums[drawn] += getattr(part, which)
    return sums
