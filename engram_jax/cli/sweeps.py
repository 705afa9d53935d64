"""The command about many runs: `sweep`."""

import math

from engram_jax.cli.processes import add_processes, is_one_of_many, joined
from engram_jax.cli.words import (
    Commands,
    Options,
    Parser,
    add_command,
    add_mesh,
    add_set,
    program,
    say,
)
from engram_jax.config import require


def add(commands: Commands) -> None:
    command = add_command(
        commands, sweep, "train every model of an experiment and set them side by side",
        "sweep memory_scaling --out runs/scaling --seeds 1 --set data.path=my.txt")
    command.add_argument("experiment", metavar="EXPERIMENT", help="a folder of experiments/")
    command.add_argument("--out", metavar="DIR", help="gets one folder a run")
    command.add_argument("--scale", default="tiny", metavar="SCALE",
                         help="tiny (default; two CPU cores), small (a GPU) or paper (a pod)")
    command.add_argument("--seeds", default="3", metavar="N or A,B,...",
                         help="how many seeds, from 0 on, or which ones (default 3)")
    command.add_argument("--dry-run", action="store_true",
                         help="say what each run would take, and run nothing")
    command.add_argument("--so-far", action="store_true",
                         help="make the table and the figure of the runs that are done, and run "
                         "nothing")
    command.add_argument("--allow-dirty", action="store_true",
                         help="run from a checkout with uncommitted changes")
    add_mesh(command)
    add_set(command)
    _add_launcher(command)
    add_processes(command)


def _add_launcher(command: Parser) -> None:
    group = command.add_argument_group("many runs at once", "see docs/clusters.md")
    group.add_argument("--launcher", choices=["local", "ray"], default="local",
                       help="train here, one run after another (default), or on a Ray cluster")
    group.add_argument("--at-once", type=int, default=1, metavar="N",
                       help="train N runs side by side on this machine's devices (default 1): "
                       "small models leave a GPU idle")
    group.add_argument("--ray-address", default="", metavar="HOST:PORT",
                       help="of the cluster; default the one of this machine or $RAY_ADDRESS, or "
                       "else a new one on this machine")
    group.add_argument("--resources", default="", metavar="NAME=AMOUNT,...",
                       help="what a run takes of a Ray node, for example CPU=8,GPU=1; default a "
                       "GPU, or else all TPU chips, or else all CPUs of a node")
    group.add_argument("--only", default="0/1", metavar="INDEX/COUNT",
                       help="do a share of the runs: job INDEX, from 0 on, of COUNT jobs")
    group.add_argument("--match", default="*", metavar="PATTERN",
                       help="do the runs whose names match, such as 'layer-1-*' or '*-seed[01]'")


def sweep(options: Options) -> None:
    from engram_jax.runs.divergence import Diverged
    from engram_jax.sweeps import launchers
    from engram_jax.sweeps.sweep import Sweep, dry_run, report_so_far, run_sweep
    from engram_jax.training.placement import chosen_mesh

    chosen = Sweep(
        experiment=options.experiment, scale=options.scale, settings=tuple(options.settings),
        seeds=_seeds(options.seeds))
    if options.dry_run:
        dry_run(chosen, say, chosen_mesh(options.mesh), options.match, options.at_once)
        return
    require(bool(options.out), "out", options.out, "a sweep needs --out, a folder for its runs")
    if options.so_far:
        for name, value, whole in (("match", options.match, "*"), ("only", options.only, "0/1")):
            require(value == whole, name, value, "picks the runs that are trained; --so-far makes "
                    "the table of all that are done")
        report_so_far(chosen, options.out, say)
        return
    for name, value, alone in (("launcher", options.launcher, "local"),
                               ("at-once", options.at_once, 1)):
        require(value == alone or not is_one_of_many(options), name, value,
                "starts the processes itself; leave --distributed out")
    only = launchers.parsed_share(options.only)
    with joined(options) as tell:
        launcher, mesh = launchers.chosen(
            options.launcher, options.mesh, options.ray_address, options.resources,
            options.at_once)
        results = run_sweep(chosen, options.out, tell, mesh, launcher, only, options.match,
                            options.allow_dirty)
        if (only, options.match) != ((0, 1), "*"):
            tell(f"{len(results)} runs of these are done; --so-far makes the table of what is "
                 "done, and the same command without --only and --match does all runs")
            return
        lost = [result["name"] for result in results if not math.isfinite(result["loss"])]
        if lost:
            raise Diverged(f"{', '.join(lost)}: diverged; the table has the others")
        best = min(results, key=lambda result: result["loss"])
        tell(f"next: {program()} generate {options.out}/{best['name']} --prompt 'import ', or the "
             "same sweep on your own text: add --set data.path=FILE and another --out")


def _seeds(text: str) -> tuple[int, ...]:
    """ "3" is the first three, "4,7" are these two."""
    words = text.split(",")
    require(all(word.strip().isdecimal() for word in words), "seeds", text,
            "must be how many, for example 3, or which ones, for example 0,1,4")
    numbers = tuple(int(word) for word in words)
    return numbers if len(words) > 1 else tuple(range(numbers[0]))
