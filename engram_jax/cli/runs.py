"""Commands about one run on a disk: `train`, `evaluate` and `reproduce`."""

import typing

from engram_jax.cli.models import add_recipe, named_run
from engram_jax.cli.processes import add_processes, joined
from engram_jax.cli.words import (
    Commands,
    Options,
    add_command,
    add_directory,
    add_json,
    add_mesh,
    add_set,
    keeping_programs,
    program,
    say,
)
from engram_jax.config import RunConfig
from engram_jax.settings import json_text, with_settings

if typing.TYPE_CHECKING:
    from engram_jax.runs.directory import RunDirectory
    from engram_jax.runs.reader import Reader
    from engram_jax.training.state import TrainState


def add(commands: Commands) -> None:
    _add_train(commands)
    _add_evaluate(commands)
    _add_reproduce(commands)


def _add_train(commands: Commands) -> None:
    command = add_command(
        commands, train, "train one model; the same command goes on where a stopped run was",
        "train tiny --out runs/mine --set data.path=my.txt --set training.steps=200")
    add_recipe(command)
    command.add_argument("--out", required=True, metavar="DIR",
                         help="the run's own folder, on a disk or gs://")
    add_mesh(command)
    add_processes(command)


@keeping_programs
def train(options: Options) -> None:
    from engram_jax.runs.train import train as run_to_end
    from engram_jax.training.placement import chosen_mesh

    run = named_run(options)
    with joined(options) as tell:
        result = run_to_end(run, options.out, tell, chosen_mesh(options.mesh))
        tell(f"loss {result['loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")
        tell(f"next: {program()} generate {options.out} --prompt 'import '")


def _add_evaluate(commands: Commands) -> None:
    command = add_command(
        commands, evaluate, "loss and bits per byte of a trained run on its validation text",
        "evaluate runs/mine --set data.path=other.txt")
    add_directory(command)
    add_set(command)
    add_json(command)


@keeping_programs
def evaluate(options: Options) -> None:
    from engram_jax.runs.directory import RunDirectory
    from engram_jax.runs.evaluate import evaluator
    from engram_jax.runs.reader import open_inputs

    records = RunDirectory(options.directory)
    own = f"data.tokenizer={records.tokenizer_path}"
    run = with_settings(records.config(), [own, *options.settings])
    inputs = open_inputs(run, artifact=records.artifact())  # in silence: the answer is printed
    loss, per_byte, tokens = evaluator(run, inputs)(_restored(records, run, inputs))
    if options.json:
        print(json_text({"loss": loss, "bits_per_byte": per_byte, "tokens": tokens}))
    else:
        print(f"loss {loss:.4f} nats a token, {per_byte:.4f} bits per byte, {tokens:,} tokens")


def _restored(records: "RunDirectory", run: RunConfig, reader: "Reader") -> "TrainState":
    """The last checkpoint of a run, on this process's first device."""
    from engram_jax.runs.checkpoints import last_checkpoint
    from engram_jax.training.placement import placed_state, single_mesh

    with last_checkpoint(records, reader) as checkpoint:
        return checkpoint.restore(placed_state(run, single_mesh()))


def _add_reproduce(commands: Commands) -> None:
    command = add_command(
        commands, reproduce,
        "train a finished run again from its own record, and compare every logged loss to the bit",
        "reproduce runs/mine")
    command.add_argument("directory", metavar="DIR", help="a finished run's folder")
    command.add_argument("--out", metavar="FOLDER",
                         help="gets the second run (default DIR/reproduction)")
    add_mesh(command)


@keeping_programs
def reproduce(options: Options) -> int:
    from engram_jax.sweeps.reproducing import reproduce as again

    comparison = again(options.directory, options.out, say, options.mesh)
    print(comparison)
    return 0 if comparison.same else 1
