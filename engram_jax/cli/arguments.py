"""The words of the command line: what each command is called, takes and says of itself."""

import argparse
import typing

from engram_jax import __version__
from engram_jax.config import ROW_DTYPES

ANALYSES = ("gates", "lens", "cka", "suppression", "patchscope", "tokenizer", "memory")
SET_HELP = ("change a field of the config, for example --set training.steps=100 or "
            "--set data.path=my.txt; may be repeated")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    top = _Parser(
        prog="engram-jax",
        description="Engram: conditional memory for language models, on JAX meshes.",
        epilog="Start with: engram-jax describe tiny; engram-jax sweep memory_scaling --out runs")
    top.add_argument("--version", action="version", version=f"engram-jax {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_describe(commands)
    _add_plan(commands)
    _add_train(commands)
    _add_sweep(commands)
    _add_compare(commands)
    _add_reproduce(commands)
    _add_analyze(commands)
    _add_report(commands)
    _add_evaluate(commands)
    _add_generate(commands)
    _add_export(commands)
    _add_verify(commands)
    _add_bench(commands)
    return top


def _command(commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"Example: engram-jax {example}")
    made.set_defaults(command=name)
    return made


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                         dest="settings", help=SET_HELP)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_processes(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "many processes", "the same command in each, all with the same settings; see BUILD.md")
    group.add_argument("--distributed", action="store_true",
                       help="find the others: Cloud TPU, Slurm, Kubernetes, Open MPI")
    group.add_argument("--coordinator", metavar="HOST:PORT",
                       help="where process 0 is, on a cluster that is not found by itself")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 on")
    group.add_argument("--timeout", type=int, default=300, metavar="SECONDS",
                       help="give up on processes that do not come in time (default 300)")


def _add_recipe(command: argparse.ArgumentParser) -> None:
    from engram_jax.recipes import RECIPES

    command.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")


def _add_describe(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "describe",
                       "count a model's parameters, FLOPs and table bytes", "describe engram-27b")
    _add_recipe(command)
    _add_set(command)
    _add_json(command)


def _add_plan(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "plan",
        "compile a training step for a TPU slice, without one: memory, FLOPs, collectives, time",
        "plan engram-27b --topology v5p:4x4x4 --set training.accumulate=20")
    _add_recipe(command)
    command.add_argument("--topology", required=True, metavar="CHIP:LAYOUT",
                         help="a slice, for example v5e:16x16 or v5p:4x4x4")
    command.add_argument("--fsdp", type=int, default=0, metavar="N",
                         help="devices that parameters are split over (default: all)")
    _add_set(command)
    _add_json(command)


def _add_train(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "train",
        "train one model; the same command goes on where a stopped run was",
        "train tiny --out runs/mine --set data.path=my.txt --set training.steps=200")
    _add_recipe(command)
    command.add_argument("--out", required=True, metavar="DIR",
                         help="the run's own folder, on a disk or gs://")
    _add_mesh(command)
    _add_set(command)
    _add_processes(command)


def _add_mesh(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mesh", metavar="DATAxFSDP", default=None,
                         help="split batches over both, parameters over the second, tables over "
                         "both; default $ENGRAM_MESH, or else all devices as 1xN")


def _add_sweep(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "sweep",
        "train every model of an experiment and set them side by side",
        "sweep memory_scaling --out runs/scaling --seeds 1 --set data.path=my.txt")
    command.add_argument("experiment", metavar="EXPERIMENT", help="a folder of experiments/")
    command.add_argument("--out", metavar="DIR", help="gets one folder a run")
    command.add_argument("--scale", default="tiny", metavar="SCALE",
                         help="tiny (default; two CPU cores), small (a GPU) or paper (a pod)")
    command.add_argument("--seeds", default="3", metavar="N or A,B,...",
                         help="how many seeds, from 0 on, or which ones (default 3)")
    command.add_argument("--dry-run", action="store_true",
                         help="say what each run would take, and run nothing")
    command.add_argument("--allow-dirty", action="store_true",
                         help="run from a checkout with uncommitted changes")
    _add_mesh(command)
    _add_set(command)
    _add_launcher(command)
    _add_processes(command)


def _add_launcher(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("many runs at once", "see BUILD.md")
    group.add_argument("--launcher", choices=["local", "ray"], default="local",
                       help="train here, one run after another (default), or on a Ray cluster")
    group.add_argument("--ray-address", default="", metavar="HOST:PORT",
                       help="of the cluster; default the one of this machine or $RAY_ADDRESS, or "
                       "else a new one on this machine")
    group.add_argument("--resources", default="", metavar="NAME=AMOUNT,...",
                       help="what a run takes of a Ray node, for example CPU=8,GPU=1; default a "
                       "GPU, or else all TPU chips, or else all CPUs of a node")
    group.add_argument("--only", default="0/1", metavar="INDEX/COUNT",
                       help="do a share of the runs: job INDEX, from 0 on, of COUNT jobs")


def _add_compare(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "compare",
        "set trained runs side by side: what differs, what it cost, and the losses over seeds",
        "compare runs/scaling runs/mine")
    command.add_argument("directories", metavar="DIR", nargs="+",
                         help="a run's folder, or one that holds such, as a sweep's")
    _add_json(command)


def _add_reproduce(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "reproduce",
        "train a finished run again from its own record, and compare every logged loss to the bit",
        "reproduce runs/mine")
    command.add_argument("directory", metavar="DIR", help="a finished run's folder")
    command.add_argument("--out", metavar="FOLDER",
                         help="gets the second run (default DIR/reproduction)")
    _add_mesh(command)


def _add_analyze(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "analyze",
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
    command.add_argument("--out", metavar="FOLDER", help="gets WHAT.json (default: printed)")


def _add_report(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "report",
        "put trained runs, what they cost and what happens inside them on one page of HTML that "
        "needs no network", "report runs/scaling --out scaling.html")
    command.add_argument("directories", metavar="DIR", nargs="+",
                         help="a run's folder, or one that holds such, as a sweep's")
    command.add_argument("--out", default="report.html", metavar="FILE",
                         help="the page (default report.html)")
    command.add_argument("--text", metavar="FILE",
                         help="that the runs read (default: the first run's validation text)")


def _add_evaluate(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "evaluate",
        "loss and bits per byte of a trained run on its validation text",
        "evaluate runs/mine --set data.path=other.txt")
    command.add_argument("directory", metavar="DIR", help="a run's folder")
    _add_set(command)
    _add_json(command)


def _add_generate(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "generate", "continue a text with a trained run",
                       "generate runs/mine --prompt 'def read(' --tokens 60")
    command.add_argument("directory", metavar="DIR", help="a run's folder")
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


def _add_export(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "export", "write a trained run's tables to files that inference reads",
        "export runs/mine --format table --dtype fp8")
    command.add_argument("directory", metavar="DIR", help="a run's folder")
    command.add_argument("--format", required=True, choices=["table"],
                         help="table: one file for each table, rows packed with their scales")
    command.add_argument("--dtype", default="fp8", choices=ROW_DTYPES,
                         help="of the rows (default fp8: e4m3, a scale for each 32 columns)")
    command.add_argument("--out", metavar="FOLDER",
                         help="gets SITE.DTYPE.table, on a disk (default DIR/tables)")


def _add_verify(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "verify", "read table files whole and check every block",
                       "verify runs/mine/tables/layer_1.fp8.table")
    command.add_argument("files", metavar="FILE", nargs="+", help="as `export` writes them")
    _add_json(command)


def _add_bench(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "bench",
                       "measure this machine: hash (jitted against NumPy), table (row updates "
                       "against the table's size), optimizers (of tables), exchange (rows on "
                       "eight devices against a sharded gather), gather (tokens to packed rows "
                       "from a table in host memory), offload (inference with the table on the "
                       "device, the host and a disk, against no memory)", "bench hash --json")
    command.add_argument("what", choices=["hash", "table", "optimizers", "exchange", "gather",
                                          "offload"])
    command.add_argument("--size", choices=["tiny", "4b"], default="",
                         help="of bench offload: the demo's model (default), or a dense model of "
                         "4.1B parameters with a table of 42 GB, for an accelerator")
    command.add_argument("--trace", default="", metavar="DIR",
                         help="of bench offload: write a trace of a few requests, for Perfetto")
    _add_json(command)
