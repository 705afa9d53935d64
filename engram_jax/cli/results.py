"""Commands that look at trained runs: `compare`, `analyze` and `report`."""

import contextlib
import math
import sys
import typing

from engram_jax.cli.words import (
    Commands,
    Options,
    add_command,
    add_directories,
    add_json,
    add_mesh,
    keeping_programs,
    say,
)
from engram_jax.config import require
from engram_jax.settings import json_text

ANALYSES = ("gates", "lens", "cka", "suppression", "patchscope", "tokenizer", "memory")


def add(commands: Commands) -> None:
    _add_compare(commands)
    _add_analyze(commands)
    _add_report(commands)


def _add_compare(commands: Commands) -> None:
    command = add_command(
        commands, compare,
        "set trained runs side by side: what differs, what it cost, and the losses over seeds",
        "compare runs/scaling runs/mine --baseline no-memory")
    add_directories(command)
    command.add_argument("--baseline", default="", metavar="ARM",
                         help="measure the others against this arm (default: the first)")
    command.add_argument("--axis", action="append", default=[], metavar="FIELD",
                         help="refuse arms that differ from the baseline in anything else; a field "
                         "or a part of the config, for example model.engram; may be repeated")
    command.add_argument("--equal-loss", nargs="?", type=float, const=math.nan, default=None,
                         metavar="LOSS",
                         help="of each run its own checkpoint whose validation loss is nearest to "
                         "LOSS (default: the lowest that all runs of a seed reach), with its "
                         "scores and those of runs that began from it")
    command.add_argument("--tolerance", type=float, default=0.01, metavar="NATS",
                         help="that a loss may differ by with --equal-loss (default 0.01)")
    add_json(command)


def compare(options: Options) -> None:
    if options.equal_loss is not None:
        _compare_at_equal_loss(options)
        return
    from engram_jax.results import comparing

    compared = comparing.comparison(options.directories, options.baseline, options.axis)
    print(json_text(comparing.to_json(compared), indent=1) if options.json
          else comparing.described(compared))


def _compare_at_equal_loss(options: Options) -> None:
    from engram_jax.results import equal_loss

    for name, given in (("baseline", options.baseline), ("axis", options.axis)):
        require(not given, name, given, "is not of a comparison at equal loss")
    loss = None if math.isnan(options.equal_loss) else options.equal_loss
    choices = equal_loss.at_equal_loss(options.directories, loss, options.tolerance)
    print(json_text(equal_loss.to_json(choices, options.tolerance), indent=1) if options.json
          else equal_loss.described(choices, options.tolerance))


def _add_analyze(commands: Commands) -> None:
    command = add_command(
        commands, analyze,
        "look inside trained runs: gates, layers' predictions (lens), likeness of layers (cka), "
        "losses without memory (suppression), what the model says of its states (patchscope), what "
        "compression merges (tokenizer), how rows are used (memory); prints JSON",
        "analyze lens runs/mine runs/other --text book.txt")
    command.add_argument("what", choices=ANALYSES, metavar="WHAT",
                         help=f"one of {', '.join(ANALYSES)}")
    command.add_argument("directories", metavar="DIR", nargs="+", help="runs' folders")
    command.add_argument("--text", metavar="FILE",
                         help="that they read (default: the first run's validation text)")
    command.add_argument("--spans", metavar="FILE",
                         help="of cka: the spans of --text whose last tokens are compared, `start "
                         "end` in characters on each line, or a text of its own in Few-NERD's "
                         "format (default: names in the text)")
    command.add_argument("--tasks", metavar="FILE",
                         help="of suppression: also answers to prompts, a line of JSON each with "
                         "task, prompt and answer")
    command.add_argument("--harness", default="", metavar="NAME,...",
                         help="of suppression: also tasks of lm-evaluation-harness (extra eval), "
                         "with the share of each score that is left without memory")
    command.add_argument("--include", default="", metavar="FOLDER",
                         help="of task files of your own, for --harness")
    command.add_argument("--shots", type=int, default=None, metavar="N",
                         help="examples before each question of --harness; default the task's")
    command.add_argument("--limit", type=int, default=None, metavar="N",
                         help="questions of a task of --harness (default all)")
    command.add_argument("--out", metavar="FOLDER", help="gets WHAT.json (default: printed)")
    add_mesh(command, "one device")


@keeping_programs
def analyze(options: Options) -> None:
    from engram_jax.insides import analyses

    require(options.limit is None or options.limit >= 1, "limit", options.limit,
            "must be at least 1")
    require(not options.harness or options.what == "suppression", "--harness", options.harness,
            f"is of analyze suppression, not of analyze {options.what}")
    findings = analyses.analyze(options.what, options.directories, options.text, options.spans,
                                options.tasks, options.mesh)
    if options.harness:
        _add_retained(options, findings)
    text = json_text(findings, indent=1)
    if options.out:
        analyses.write(text, options.what, options.out)
    else:
        print(text)


def _add_retained(options: Options, findings: dict[str, typing.Any]) -> None:
    """What each run keeps of its scores on the harness's tasks, into its findings."""
    from engram_jax.evaluation import benchmarks, retained
    from engram_jax.inference.serving import served
    from engram_jax.runs.directory import RunDirectory

    names = [name.strip() for name in options.harness.split(",") if name.strip()]
    chosen = benchmarks.chosen(names, options.shots)
    for line in chosen.told():
        print(line, file=sys.stderr)
    for directory in options.directories:
        model = served(RunDirectory(directory), mesh=options.mesh)
        with contextlib.closing(model.rows):
            findings[model.run.name]["harness"] = retained.retained(
                model, chosen, options.include, options.limit)


def _add_report(commands: Commands) -> None:
    command = add_command(
        commands, report,
        "put trained runs, what they cost and what happens inside them on one page of HTML that "
        "needs no network", "report runs/scaling --out scaling.html")
    add_directories(command)
    command.add_argument("--out", default="report.html", metavar="FILE",
                         help="the page (default report.html)")
    command.add_argument("--text", metavar="FILE",
                         help="that the runs read (default: the first run's validation text)")
    add_mesh(command, "one device")


@keeping_programs
def report(options: Options) -> None:
    from engram_jax.report.page import write_report

    write_report(options.directories, options.out, options.text, say, options.mesh)
    say(f"the page: {options.out}")
