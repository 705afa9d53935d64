"""The command line: `engram-jax COMMAND --help` teaches each command.

Exit codes: 0 done, 1 the machine failed (disk, memory), 2 the user can mend it; the reason is one
line on standard error. `reproduce` ends with 1, too, where the second run differs.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence

from engram_jax.cli.arguments import parser
from engram_jax.config import RunConfig, require
from engram_jax.errors import MachineError, UserError
from engram_jax.settings import with_settings

if typing.TYPE_CHECKING:
    from engram_jax.runs.directory import RunDirectory
    from engram_jax.runs.reader import Reader
    from engram_jax.training.state import TrainState


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(words)
    _quieten()
    try:
        return COMMANDS[options.command](options) or 0
    except (Exception, KeyboardInterrupt) as error:
        if (ending := _ending(error)) is None:
            raise
        code, line = ending
        if line:
            print(f"engram-jax: {line}", file=sys.stderr)
        return code


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


def describe(options: argparse.Namespace) -> None:
    from engram_jax.costs import accounting

    run = _recipe(options)
    if options.json:
        print(json.dumps({"name": run.name, **accounting.account(run).to_dict()}, indent=1))
    else:
        print(accounting.described(run))


def plan(options: argparse.Namespace) -> None:
    from engram_jax.costs import plan

    found = plan.plan(_recipe(options), options.topology, options.fsdp)
    print(found.to_json() if options.json else plan.described(found))


def train(options: argparse.Namespace) -> None:
    from engram_jax.runs.train import train as run_to_end
    from engram_jax.training.placement import chosen_mesh

    run = _recipe(options)
    with _joined(options) as say:
        result = run_to_end(run, options.out, say, chosen_mesh(options.mesh))
        say(f"loss {result['loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")
        say(f"next: {_program()} generate {options.out} --prompt 'import '")


def sweep(options: argparse.Namespace) -> None:
    from engram_jax.sweeps import launchers
    from engram_jax.sweeps.sweep import Sweep, dry_run, run_sweep
    from engram_jax.training.placement import chosen_mesh

    chosen = Sweep(
        experiment=options.experiment, scale=options.scale, settings=tuple(options.settings),
        seeds=_seeds(options.seeds))
    if options.dry_run:
        dry_run(chosen, _say, chosen_mesh(options.mesh))
        return
    require(bool(options.out), "out", options.out, "a sweep needs --out, a folder for its runs")
    require(options.launcher == "local" or not _is_one_of_many(options), "launcher",
            options.launcher, "starts the processes itself; leave --distributed out")
    only = launchers.parsed_share(options.only)
    with _joined(options) as say:
        launcher, mesh = launchers.chosen(
            options.launcher, options.mesh, options.ray_address, options.resources)
        results = run_sweep(chosen, options.out, say, mesh, launcher, only,
                            options.allow_dirty)
        if only != (0, 1):
            say(f"{len(results)} runs of this share are done; the same command without --only "
                "makes the table once all are")
            return
        best = min(results, key=lambda result: result["loss"])
        say(f"next: {_program()} generate {options.out}/{best['name']} --prompt 'import ', or the "
            "same sweep on your own text: add --set data.path=FILE and another --out")


def _seeds(text: str) -> tuple[int, ...]:
    """ "3" is the first three, "4,7" are these two."""
    words = text.split(",")
    require(all(word.strip().isdecimal() for word in words), "seeds", text,
            "must be how many, for example 3, or which ones, for example 0,1,4")
    numbers = tuple(int(word) for word in words)
    return numbers if len(words) > 1 else tuple(range(numbers[0]))


@contextlib.contextmanager
def _joined(options: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Join the other processes, if there are any, for what is within; yields what talks."""
    from engram_jax import distributed

    if not _is_one_of_many(options):
        yield _say
        return
    distributed.start(options.coordinator, options.processes, options.process, options.timeout)
    try:
        yield distributed.first_only(_say)
        distributed.stop()
    except BaseException as error:  # the others must hear of it, and an exit would wait for them
        ending = _ending(error)
        if ending is None and (line := distributed.lost(error)):
            ending = 1, line
        if ending is None:
            traceback.print_exc()
            ending = 1, _one_line(error)
        distributed.leave(*ending)


def _is_one_of_many(options: argparse.Namespace) -> bool:
    place = options.coordinator, options.processes, options.process
    return options.distributed or place != (None, None, None)


def compare(options: argparse.Namespace) -> None:
    from engram_jax.results import comparing

    found = comparing.arms(options.directories)
    print(json.dumps(comparing.to_json(found), indent=1) if options.json
          else comparing.described(found))


def reproduce(options: argparse.Namespace) -> int:
    from engram_jax.sweeps.reproducing import reproduce as again

    found = again(options.directory, options.out, _say, options.mesh)
    print(found)
    return 0 if found.same else 1


def analyze(options: argparse.Namespace) -> None:
    from engram_jax.insides import analyses

    found = analyses.analyze(options.what, options.directories, options.text, options.spans,
                             options.tasks)
    text = json.dumps(found, indent=1)
    if options.out:
        analyses.write(text, options.what, options.out)
    else:
        print(text)


def report(options: argparse.Namespace) -> None:
    from engram_jax.report.page import write_report

    write_report(options.directories, options.out, options.text, _say)
    _say(f"the page: {options.out}")


def evaluate(options: argparse.Namespace) -> None:
    from engram_jax.runs.directory import RunDirectory
    from engram_jax.runs.evaluate import evaluator
    from engram_jax.runs.reader import open_inputs

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


def export(options: argparse.Namespace) -> None:
    from engram_jax.runs.export import export_tables

    export_tables(options.directory, options.dtype, options.out, _say)


def verify(options: argparse.Namespace) -> None:
    from engram_jax.offload.file import verify as verified

    found = {path: verified(path) for path in options.files}
    if options.json:
        print(json.dumps({path: dataclasses.asdict(info) for path, info in found.items()}))
        return
    for path, info in found.items():
        print(f"{path}: whole; {info.rows:,} rows of {info.dim} columns in {info.dtype}, "
              f"{info.site} of {info.run!r} at step {info.step}")


def bench(options: argparse.Namespace) -> None:
    result = _benchmark(options)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:<28} {value:,.4g}" if isinstance(value, float) else f"{name:<28} {value}")


def _benchmark(options: argparse.Namespace) -> dict[str, typing.Any]:
    what = options.what
    for name in ("size", "trace"):
        if getattr(options, name) and what != "offload":
            raise UserError(f"--{name} is of bench offload, not of bench {what}")
    if what == "offload":
        from engram_jax.benchmarks import offload

        return offload.offload_benchmark(
            offload.WORKLOADS[options.size or "tiny"](), options.trace)
    if what == "hash":
        from engram_jax.benchmarks.hashing import hash_benchmark

        return hash_benchmark()
    if what == "table":
        from engram_jax.benchmarks.table import table_benchmark

        return table_benchmark()
    if what == "optimizers":
        from engram_jax.benchmarks.row_optimizers import row_optimizer_benchmark

        return row_optimizer_benchmark()
    if what == "gather":
        from engram_jax.benchmarks.gather import gather_benchmark

        return gather_benchmark()
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
    from engram_jax.runs.checkpoints import last_checkpoint
    from engram_jax.training.placement import placed_state, single_mesh

    with last_checkpoint(records, reader) as found:
        return found.restore(placed_state(run, single_mesh()))


def _program() -> str:
    """This command as the user can type it: with its folder if that is not on the path."""
    name = "engram-jax"
    return sys.argv[0] if sys.argv[0].endswith(name) and not shutil.which(name) else name


def _say(line: str) -> None:
    print(line, flush=True)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    command.__name__: command for command in (
        describe, plan, train, sweep, compare, reproduce, analyze, report, evaluate, generate,
        export, verify, bench)}
