"""Commands that use a trained run: `generate`, and its tables as files, `export` and `verify`."""

import contextlib
import dataclasses

from engram_jax.cli.words import Commands, Options, add_command, add_directory, add_json, say
from engram_jax.config import ROW_DTYPES
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


def generate(options: Options) -> None:
    from engram_jax.inference.generate import generate as pieces
    from engram_jax.inference.serving import served
    from engram_jax.runs.directory import RunDirectory

    model = served(RunDirectory(options.directory), options.memory, options.dtype)
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
        commands, export, "write a trained run's tables to files that inference reads",
        "export runs/mine --format table --dtype fp8")
    add_directory(command)
    command.add_argument("--format", required=True, choices=["table"],
                         help="table: one file for each table, rows packed with their scales")
    command.add_argument("--dtype", default="fp8", choices=ROW_DTYPES,
                         help="of the rows (default fp8: e4m3, a scale for each 32 columns)")
    command.add_argument("--out", metavar="FOLDER",
                         help="gets SITE.DTYPE.table, on a disk (default DIR/tables)")


def export(options: Options) -> None:
    from engram_jax.runs.export import export_tables

    export_tables(options.directory, options.dtype, options.out, say)


def _add_verify(commands: Commands) -> None:
    command = add_command(commands, verify, "read table files whole and check every block",
                          "verify runs/mine/tables/layer_1.fp8.table")
    command.add_argument("files", metavar="FILE", nargs="+", help="as `export` writes them")
    add_json(command)


def verify(options: Options) -> None:
    from engram_jax.offload.file import verify as verified

    tables = {path: verified(path) for path in options.files}
    if options.json:
        print(json_text({path: dataclasses.asdict(info) for path, info in tables.items()}))
        return
    for path, info in tables.items():
        print(f"{path}: whole; {info.rows:,} rows of {info.dim} columns in {info.dtype}, "
              f"{info.site} of {info.run!r} at step {info.step}")
