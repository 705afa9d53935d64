"""Commands that use a trained run: `generate`, and its tables as files, `export` and `verify`."""

import contextlib
import dataclasses
import os
from typing import Any

from engram_jax.cli.words import (
    Commands,
    Options,
    add_command,
    add_directory,
    add_json,
    add_mesh,
    keeping_programs,
    say,
)
from engram_jax.config import ROW_DTYPES, require
from engram_jax.settings import json_text


def add(commands: Commands) -> None:
    _add_generate(commands)
    _add_export(commands)
    _add_verify(commands)


def _add_generate(commands: Commands) -> None:
    command = add_command(commands, generate, "continue a text with a trained run",
                          "generate runs/mine --prompt 'def read(' --tokens 60")
    add_directory(command)
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    command.add_argument("--tokens", type=int, default=64, metavar="N",
                         help="how many tokens to generate (default 64)")
    command.add_argument("--memory", choices=["device", "host", "disk"], default="device",
                         help="where the tables are; the text is the same (default device)")
    command.add_argument("--dtype", choices=ROW_DTYPES, default="",
                         help="of the rows on host or disk; default that of training")
    command.add_argument("--cache", type=int, default=0, metavar="N",
                         help="tokens that the cache holds, the prompt's included; default as many "
                         "as needed")
    command.add_argument("--temperature", type=float, default=0.0, metavar="X",
                         help="0 takes the likeliest token (default), 1 samples the model")
    command.add_argument("--top-k", type=int, default=0, metavar="N",
                         help="sample from the N likeliest tokens; 0 is all (default)")
    command.add_argument("--top-p", type=float, default=1.0, metavar="X",
                         help="sample from the likeliest tokens that together have this "
                         "probability (default 1)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    add_mesh(command, "one device")


@keeping_programs
def generate(options: Options) -> None:
    from engram_jax.inference.generate import generate as pieces
    from engram_jax.inference.serving import served
    from engram_jax.runs.directory import RunDirectory

    model = served(RunDirectory(options.directory), options.memory, options.dtype,
                   mesh=options.mesh)
    with contextlib.closing(model.rows):
        made = pieces(model, options.prompt, tokens=options.tokens, cache=options.cache,
                      temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                      seed=options.seed)
        first = next(made, "")  # nothing is printed before rows are known to be there
        print(options.prompt, end=first, flush=True)
        for piece in made:
            print(piece, end="", flush=True)
        print()


def _add_export(commands: Commands) -> None:
    command = add_command(
        commands, export, "write a trained run's tables, or all of it as safetensors",
        "export runs/mine --format table --dtype fp8")
    add_directory(command)
    command.add_argument("--format", required=True, choices=["table", "safetensors", "orbax"],
                         help="table: one file for each table, rows packed with their scales; "
                         "safetensors: model and tables for other libraries, with checksums; "
                         "orbax: a run's folder without the optimizer")
    command.add_argument("--dtype", default="fp8", choices=ROW_DTYPES,
                         help="of the rows of a table file (default fp8: e4m3, a scale for each 32 "
                         "columns); safetensors have that of training")
    command.add_argument("--out", metavar="FOLDER",
                         help="on a disk; gets SITE.DTYPE.table (default DIR/tables), or is made "
                         "for the other formats")


def export(options: Options) -> None:
    from engram_jax.interop import export_run, strip_run
    from engram_jax.runs.export import export_tables

    if options.format != "table":
        require(bool(options.out), "out", options.out,
                f"{options.format} needs --out, a folder to make")
        made = export_run if options.format == "safetensors" else strip_run
        say(f"the export: {made(options.directory, options.out, say)}")
        return
    export_tables(options.directory, options.dtype, options.out, say)


def _add_verify(commands: Commands) -> None:
    command = add_command(
        commands, verify, "read runs (checkpoints, token shards, tables) or table files whole and "
        "check every byte that has a checksum", "verify runs/mine")
    command.add_argument("paths", metavar="PATH", nargs="+",
                         help="a run's folder, or a file that `export` wrote")
    add_json(command)


def verify(options: Options) -> int:
    answers = [_verified_run(path) if os.path.isdir(path) or "://" in path else
               _verified_table(path) for path in options.paths]
    if options.json:
        print(json_text({path: answer for path, (_, answer, _) in
                         zip(options.paths, answers, strict=True)}, indent=1))
    else:
        print("\n".join(line for lines, _, _ in answers for line in lines))
    return 0 if all(whole for _, _, whole in answers) else 1


def _verified_table(path: str) -> tuple[list[str], Any, bool]:
    """Lines for people, an answer in JSON, and whether it is whole."""
    from engram_jax.offload.file import verify as verified

    info = verified(path)
    return [f"{path}: whole; {info.rows:,} rows of {info.dim} columns in {info.dtype}, {info.site} "
            f"of {info.run!r} at step {info.step}"], dataclasses.asdict(info), True


def _verified_run(path: str) -> tuple[list[str], Any, bool]:
    """See `_verified_table`."""
    from engram_jax.runs.verify import verify_run

    findings = list(verify_run(path))
    lines = [line for finding in findings for line in (
        [f"damaged: {problem}" for problem in finding.problems]
        or [f"{finding.path}: {finding.note or 'whole'}"])]
    return (lines, {finding.path: finding.problems for finding in findings},
            not any(finding.problems for finding in findings))
