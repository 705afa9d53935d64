"""`engram-jax report`: runs as one page of HTML that needs no network.

plotly's whole script, 4.8 MB, stands in the page: its package has no smaller one, and a page that
can be mailed, kept beside its runs and opened without a network is worth the megabytes. The page's
own policy forbids every request.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from etils import epath
from plotly.offline import get_plotlyjs

from engram_jax import __version__
from engram_jax.config import require
from engram_jax.costs.accounting import short
from engram_jax.report import insides, looks, memories, outcomes, scores
from engram_jax.report.blocks import Folded, Section
from engram_jax.report.findings import Material, material
from engram_jax.report.looks import signed
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import json_text, to_dict
from engram_jax.storage import is_local, write_text

SECTIONS: tuple[Callable[[Material], Section | None], ...] = (
    outcomes.outcomes, scores.scores, outcomes.curves, outcomes.costs, insides.gates,
    insides.lens, insides.cka, insides.suppression, insides.patchscope,
    memories.tokenizer, memories.memory)
ALIKE = 0.01  # counts that differ by less are told as one

Say = Callable[[str], None]


def write_report(
    directories: Sequence[epath.PathLike], out: epath.PathLike = "report.html",
    file: epath.PathLike | None = None, say: Say = print, mesh: str | None = None,
) -> None:
    """Write the page of the runs in `directories`.

    Args:
      directories: runs' folders, or folders of such.
      out: the page; replaced whole.
      file: the text that the runs read; None is the first one's validation text.
      say: gets a line for each section that is done.
      mesh: of each run, as `serving_mesh` takes it.

    Raises:
      UserError: no run, a run without a checkpoint, no such text, or an `out` that is a folder or
        in none.
      MachineError: something cannot be read or written.
    """
    path = epath.Path(out).expanduser()
    require(not path.is_dir(), "out", os.fspath(out), "is a folder; name a file, for example "
            f"{os.fspath(path / 'report.html')}")
    if is_local(path):
        require(path.parent.is_dir() and os.access(path.parent, os.W_OK), "out", os.fspath(out),
                "its folder is not there or cannot be written")
    gathered = material(directories, file, mesh)
    sections = []
    for make in SECTIONS:
        if (section := make(gathered)) is not None:
            sections.append(section)
            say(f"done: {section.title}")
    words = ["engram-jax", "report", *map(os.fspath, directories), "--out", os.fspath(out),
             *(["--text", os.fspath(file)] if file else []),
             *(["--mesh", mesh] if mesh else [])]
    title = gathered.arms[0].name if len(gathered.arms) == 1 else ", ".join(
        RunDirectory(directory).path.name for directory in directories)
    write_text(path, page(title, gathered, [*sections, records(gathered, shlex.join(words))]))


def page(title: str, material: Material, sections: Sequence[Section]) -> str:
    """The page, as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("engram_jax.report", "parts"), autoescape=True,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    loader = environment.loader
    assert loader is not None
    style, script = (loader.get_source(environment, name)[0] for name in ("style.css", "page.js"))
    return environment.get_template("template.html.j2").render(
        title=title, headline=headline(material), facts=facts(material),
        sections=sections, swap=looks.swap([subject.look for subject in material.subjects]),
        style=style, script=script, plotly=get_plotlyjs(), version=__version__)


def headline(material: Material) -> tuple[str, str]:
    """The number that stands over the page, and what it is."""
    first, *others = material.arms
    loss, bits = first.mean("loss"), first.mean("bits_per_byte")
    gaps = {arm.name: gap for arm in others if (gap := arm.against(first))}
    if gaps:
        best = min(gaps, key=lambda name: gaps[name].mean)
        arm, gap = next(arm for arm in others if arm.name == best), gaps[best]
        spread = outcomes.ends(gap, signed)
        seeds = f"{gap.count} seed{'s' * (gap.count > 1)}"
        ratio = arm.numbers.flops_per_token / first.numbers.flops_per_token
        cost = "at the same FLOPs a token" if abs(ratio - 1) < ALIKE else (
            f"at {ratio:.2f} times the FLOPs a token")
        return signed(gap.mean), (
            f"nats a token: the loss of {best} less that of {first.name}, {cost} "
            f"({f'95 %: {spread}, ' if spread else ''}{seeds})")
    if loss is None or bits is None:
        return "-", f"{first.name} is not done"
    return f"{loss.mean:.3f}", (f"nats a token: the validation loss of {first.name}, "
                                f"{bits.mean:.3f} bits a byte")


def facts(material: Material) -> list[str]:
    """What the runs are, in a few words each."""
    runs = [run for arm in material.arms for run in arm.runs]
    texts = dict.fromkeys(
        epath.Path(path).name for run in runs for path in run.config.data.sources)
    tokens = {run.config.training.steps * run.config.data.batch_size
              * run.config.data.sequence_length for run in runs}
    active = {arm.numbers.active_params for arm in material.arms}
    return [f"{len(runs)} run{'s' * (len(runs) > 1)} in {len(material.arms)} "
            f"arm{'s' * (len(material.arms) > 1)}",
            f"trained on {', '.join(texts)}", f"{_span(tokens)} tokens each",
            f"{_span(active)} active parameters"]


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return short(low) if high - low <= ALIKE * low else f"{short(low)} to {short(high)}"


def records(material: Material, command: str) -> Section:
    """Config and environment of each run, and the commands."""
    blocks = [Folded(title=run.path.name, texts=_of_run(run.path, to_dict(run.config)))
              for arm in material.arms for run in arm.runs]
    blocks.append(Folded(title="This page", texts=[("made by", command)]))
    return Section(name="records", title="Configs and environments", blocks=blocks,
                   reading="What each run was, on what it ran, and the commands that made it and "
                   "this page.")


def _of_run(path: epath.Path, config: dict[str, Any]) -> list[tuple[str, str]]:
    env = RunDirectory(path).env()
    command = shlex.join(map(str, env.get("command", [])))
    return [*([("made by", command)] if command else []), ("folder", str(path)),
            ("config.json", json_text(config, indent=1, sort_keys=True)),
            *([("env.json", json_text(env, indent=1, sort_keys=True))] if env else [])]
