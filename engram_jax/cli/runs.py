"""Commands that train one run on a disk: `train`, `extend` and `reproduce`."""

from engram_jax.cli.models import add_recipe, named_run
from engram_jax.cli.processes import add_processes, joined
from engram_jax.cli.words import (
    Commands,
    Options,
    Parser,
    add_command,
    add_directory,
    add_mesh,
    add_set,
    keeping_programs,
    program,
    say,
)
from engram_jax.config import RunConfig


def add(commands: Commands) -> None:
    _add_train(commands)
    _add_extend(commands)
    _add_reproduce(commands)


def _add_train(commands: Commands) -> None:
    command = add_command(
        commands, train, "train one model; the same command goes on where a stopped run was",
        "train tiny --out runs/mine --set data.path=my.txt --set training.steps=200")
    add_recipe(command)
    _add_training(command)


def _add_training(command: Parser) -> None:
    """What every command that trains a run of its own is told."""
    command.add_argument("--out", required=True, metavar="DIR",
                         help="the run's own folder, on a disk or gs://")
    command.add_argument("--profile", default="", metavar="FIRST:LAST",
                         help="trace these steps into DIR/profile, for XProf and Perfetto")
    add_mesh(command)
    add_processes(command)


def train(options: Options) -> None:
    _to_end(named_run(options), options)


def _to_end(run: RunConfig, options: Options) -> None:
    from engram_jax.runs.train import train as run_to_end
    from engram_jax.sweeps.compilations import kept_compilations
    from engram_jax.training.placement import chosen_mesh

    with joined(options) as tell, kept_compilations():
        result = run_to_end(run, options.out, tell, chosen_mesh(options.mesh),
                            options.profile)
        tell(f"loss {result['loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")
        tell(f"next: {program()} generate {options.out} --prompt 'import '")


def _add_extend(commands: Commands) -> None:
    command = add_command(
        commands, extend,
        "train on at a longer sequence length, from a run's checkpoint: a new run with its weights "
        "and tables, whose positions YaRN stretches; the same command goes on where it was stopped",
        "extend runs/mine --length 1024 --out runs/longer --set training.steps=500")
    add_directory(command)
    command.add_argument("--length", type=int, required=True, metavar="N",
                         help="tokens of a sequence; YaRN's factor is N over the run's own length")
    command.add_argument("--step", type=int, default=None, metavar="N",
                         help="of the checkpoint to begin from (default: the newest)")
    command.add_argument("--optimizer", action="store_true",
                         help="take the optimizer's state and the step over, too")
    add_set(command)
    _add_training(command)


def extend(options: Options) -> None:
    from engram_jax.runs.extending import extended

    run = extended(options.directory, options.length, options.step, options.optimizer,
                   options.settings)
    _to_end(run, options)


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
