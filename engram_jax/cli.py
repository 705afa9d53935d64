"""The command line: `engram-jax COMMAND --help` teaches each command.

Exit codes: 0 done, 1 the machine failed (disk, memory), 2 the user can mend it; the reason is one
line on standard error.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence

from engram_jax import __version__
from engram_jax.config import RunConfig
from engram_jax.errors import MachineError, UserError
from engram_jax.settings import with_settings

if typing.TYPE_CHECKING:
    from engram_jax.training.inputs import Reader
    from engram_jax.training.records import RunDirectory
    from engram_jax.training.state import TrainState

SET_HELP = ("change a field of the config, for example --set training.steps=100 or "
            "--set data.path=my.txt; may be repeated")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(words)
    _quieten()
    try:
        options.command(options)
    except (Exception, KeyboardInterrupt) as error:
        if (ending := _ending(error)) is None:
            raise
        code, line = ending
        if line:
            print(f"engram-jax: {line}", file=sys.stderr)
        return code
    return 0


def _ending(error: BaseException) -> tuple[int, str] | None:
    """Exit code and line of a failure; None for a bug."""
    match error:
        case UserError():
            return 2, _one_line(error)
        case BrokenPipeError():
            return 1, ""
        case MachineError() | OSError() | MemoryError():
            return 1, _one_line(error)
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
            return 1, _one_line(MachineError(f"out of memory: {error}"))
        case KeyboardInterrupt():
            return 130, "stopped; the same command goes on from the last checkpoint"
    return None


def _quieten() -> None:
    """Keep what libraries say beside their exceptions off standard error: what matters is raised.

    The hub's client logs each retry; after a read that failed, orbax's other reads go on and find
    their event loop closed.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _OrphansAside):
        sys.unraisablehook = _OrphansAside(sys.unraisablehook)


class _OrphansAside:
    """The hook for exceptions that nobody can catch, without those of orphaned reads."""

    def __init__(self, before: Callable[[typing.Any], object]):
        self._before = before

    def __call__(self, unraisable: typing.Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


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
    _add_evaluate(commands)
    _add_generate(commands)
    _add_bench(commands)
    return top


def _command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"Example: engram-jax {example}")
    made.set_defaults(command=run)
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
    command = _command(commands, "describe", describe,
                       "count a model's parameters, FLOPs and table bytes", "describe engram-27b")
    _add_recipe(command)
    _add_set(command)
    _add_json(command)


def _add_plan(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "plan", plan,
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
        commands, "train", train,
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
        commands, "sweep", sweep,
        "train every model of an experiment and set them side by side",
        "sweep memory_scaling --out runs/scaling --set data.path=my.txt")
    command.add_argument("experiment", metavar="EXPERIMENT", help="a folder of experiments/")
    command.add_argument("--out", required=True, metavar="DIR", help="gets one folder a run")
    _add_mesh(command)
    _add_set(command)
    _add_processes(command)


def _add_evaluate(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(
        commands, "evaluate", evaluate,
        "loss and bits per byte of a trained run on its validation text",
        "evaluate runs/mine --set data.path=other.txt")
    command.add_argument("directory", metavar="DIR", help="a run's folder")
    _add_set(command)
    _add_json(command)


def _add_generate(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "generate", generate, "continue a text with a trained run",
                       "generate runs/mine --prompt 'def read(' --tokens 60")
    command.add_argument("directory", metavar="DIR", help="a run's folder")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    command.add_argument("--tokens", type=int, default=64, metavar="N",
                         help="how many tokens to generate (default 64)")
    command.add_argument("--temperature", type=float, default=0.0, metavar="X",
                         help="0 takes the likeliest token (default), 1 samples the model")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")


def _add_bench(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "bench", bench,
                       "measure this machine: hash (jitted against NumPy), table (row updates "
                       "against the table's size), optimizers (of tables), exchange (rows on "
                       "eight devices against a sharded gather)", "bench hash --json")
    command.add_argument("what", choices=["hash", "table", "optimizers", "exchange"])
    _add_json(command)


def describe(options: argparse.Namespace) -> None:
    from engram_jax import accounting

    run = _recipe(options)
    if options.json:
        print(json.dumps({"name": run.name, **accounting.account(run).to_dict()}, indent=1))
    else:
        print(accounting.described(run))


def plan(options: argparse.Namespace) -> None:
    from engram_jax import planning

    found = planning.plan(_recipe(options), options.topology, options.fsdp)
    print(found.to_json() if options.json else planning.described(found))


def train(options: argparse.Namespace) -> None:
    from engram_jax.training.loop import train as run_to_end
    from engram_jax.training.mesh import chosen_mesh

    run = _recipe(options)
    with _joined(options) as say:
        result = run_to_end(run, options.out, say, chosen_mesh(options.mesh))
        say(f"loss {result['loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")
        say(f"next: {_program()} generate {options.out} --prompt 'import '")


def sweep(options: argparse.Namespace) -> None:
    from engram_jax import sweeps
    from engram_jax.training.mesh import chosen_mesh

    with _joined(options) as say:
        results = sweeps.sweep(options.experiment, options.out, options.settings, say,
                               chosen_mesh(options.mesh))
        best = min(results, key=lambda result: result["loss"])
        say(f"next: {_program()} generate {options.out}/{best['name']} --prompt 'import ', or the "
            "same sweep on your own text: add --set data.path=FILE and another --out")


@contextlib.contextmanager
def _joined(options: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Join the other processes, if there are any, for what is within; yields what talks."""
    from engram_jax.training import processes

    place = options.coordinator, options.processes, options.process
    if not options.distributed and place == (None, None, None):
        yield _say
        return
    processes.start(*place, options.timeout)
    try:
        yield processes.first_only(_say)
        processes.stop()
    except BaseException as error:  # the others must hear of it, and an exit would wait for them
        ending = _ending(error)
        if ending is None and (line := processes.lost(error)):
            ending = 1, line
        if ending is None:
            traceback.print_exc()
            ending = 1, _one_line(error)
        processes.leave(*ending)


def evaluate(options: argparse.Namespace) -> None:
    from engram_jax.training.evaluation import evaluator
    from engram_jax.training.inputs import open_inputs
    from engram_jax.training.records import RunDirectory

    records = RunDirectory(options.directory)
    own = f"data.tokenizer={records.tokenizer_path}"
    run = with_settings(records.config(), [own, *options.settings])
    inputs = open_inputs(run)  # in silence: standard output is the answer
    loss, per_byte, tokens = evaluator(run, inputs)(_restored(records, run, inputs))
    if options.json:
        print(json.dumps({"loss": loss, "bits_per_byte": per_byte, "tokens": tokens}))
    else:
        print(f"loss {loss:.4f} nats a token, {per_byte:.4f} bits per byte, {tokens:,} tokens")


def generate(options: argparse.Namespace) -> None:
    from engram_jax.inference.generate import generate as pieces
    from engram_jax.training.inputs import open_reader
    from engram_jax.training.records import RunDirectory

    records = RunDirectory(options.directory)
    run = records.config()
    reader = open_reader(run, records.tokenizer())
    made = pieces(run, reader, _restored(records, run, reader), options.prompt,
                  tokens=options.tokens, temperature=options.temperature, seed=options.seed)
    print(options.prompt, end="", flush=True)
    for piece in made:
        print(piece, end="", flush=True)
    print()


def bench(options: argparse.Namespace) -> None:
    result = _benchmark(options.what)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:<28} {value:,.4g}" if isinstance(value, float) else f"{name:<28} {value}")


def _benchmark(what: str) -> dict[str, typing.Any]:
    if what == "hash":
        from engram_jax.benchmarks.hashing import hash_benchmark

        return hash_benchmark()
    if what == "table":
        from engram_jax.benchmarks.table import table_benchmark

        return table_benchmark()
    if what == "optimizers":
        from engram_jax.benchmarks.row_optimizers import row_optimizer_benchmark

        return row_optimizer_benchmark()
    from engram_jax.benchmarks.exchange import DEVICES, exchange_benchmark

    # Read when the first device is asked for; machines with accelerators do not mind it.
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return exchange_benchmark()


def _recipe(options: argparse.Namespace) -> RunConfig:
    from engram_jax.recipes import recipe

    run: RunConfig = with_settings(recipe(options.recipe), options.settings)
    return run


def _restored(
    records: "RunDirectory", run: RunConfig, reader: "Reader"
) -> "TrainState":
    """The last checkpoint of a run, on this process's first device."""
    from engram_jax.training.checkpoints import Checkpoints
    from engram_jax.training.mesh import placed_state, single_mesh

    if not records.checkpoints.exists():
        raise UserError(f"{records.path}: has no checkpoint yet; train it first")
    kept = run.training.keep_checkpoints
    with Checkpoints(records.checkpoints, kept, reader.fingerprints()) as found:
        return found.restore(placed_state(run, single_mesh()))


def _program() -> str:
    """This command as the user can type it: with its folder if that is not on the path."""
    name = "engram-jax"
    return sys.argv[0] if sys.argv[0].endswith(name) and not shutil.which(name) else name


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
