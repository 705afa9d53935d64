"""Commands that train one run on a disk: `train` and `reproduce`."""

from engram_jax.cli.models import add_recipe, named_run
from engram_jax.cli.processes import add_processes, joined
from engram_jax.cli.words import (
    Commands,
    Options,
    add_command,
    add_mesh,
    keeping_programs,
    program,
    say,
)


def add(commands: Commands) -> None:
    _add_train(commands)
    _add_reproduce(commands)


def _add_train(commands: Commands) -> None:
    command = add_command(
        commands, train, "train one model; the same command goes on where a stopped run was",
        "train tiny --out runs/mine --set data.path=my.txt --set training.steps=200")
    add_recipe(command)
    command.add_argument("--out", required=True, metavar="DIR",
                         help="the run's own folder, on a disk or gs://")
    command.add_argument("--profile", default="", metavar="FIRST:LAST",
                         help="trace these steps into DIR/profile, for XProf and Perfetto")
    add_mesh(command)
    add_processes(command)


def train(options: Options) -> None:
    from engram_jax.runs.train import train as run_to_end
    from engram_jax.sweeps.compilations import kept_compilations
    from engram_jax.training.placement import chosen_mesh

    run = named_run(options)
    with joined(options) as tell, kept_compilations():
        result = run_to_end(run, options.out, tell, chosen_mesh(options.mesh),
                            options.profile)
        tell(f"loss {result['loss']:.4f} nats a token, {result['bits_per_byte']:.4f} bits per byte")
        tell(f"next: {program()} generate {options.out} --prompt 'import '")


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
