"""Commands about models that need not be trained: `describe` counts one, `plan` compiles it."""

import os
import sys

from engram_jax.cli.words import Commands, Options, Parser, add_command, add_json, add_set
from engram_jax.config import RunConfig
from engram_jax.settings import json_text, with_settings


def add(commands: Commands) -> None:
    _add_describe(commands)
    _add_plan(commands)


def add_recipe(command: Parser) -> None:
    """The argument that names a run, and the options that change it."""
    from engram_jax.recipes import RECIPES

    command.add_argument("recipe", metavar="RECIPE",
                         help=f"one of {', '.join(RECIPES)}; or a config.json, a run's folder, or "
                         "MODULE:FUNCTION, a function of your own that returns a RunConfig")
    add_set(command)


def named_run(options: Options) -> RunConfig:
    """The run that the options of `add_recipe` name."""
    from engram_jax.recipes import chosen_run

    if ":" in options.recipe:
        sys.path.append(os.getcwd())  # where a MODULE of the user's own is
    run: RunConfig = with_settings(chosen_run(options.recipe), options.settings)
    return run


def _add_describe(commands: Commands) -> None:
    command = add_command(
        commands, describe, "count a model's parameters, FLOPs and table bytes",
        "describe engram-27b")
    add_recipe(command)
    add_json(command)


def describe(options: Options) -> None:
    from engram_jax.costs import accounting

    run = named_run(options)
    if options.json:
        print(json_text({"name": run.name, **accounting.account(run).to_dict()}, indent=1))
    else:
        print(accounting.described(run))


def _add_plan(commands: Commands) -> None:
    command = add_command(
        commands, plan,
        "compile a training step for a TPU slice, without one: memory, FLOPs, collectives, time",
        "plan engram-27b --topology v5p:4x4x4 --depth 3")
    add_recipe(command)
    command.add_argument("--topology", required=True, metavar="CHIP:LAYOUT",
                         help="a slice, for example v5e:16x16 or v5p:4x4x4")
    command.add_argument("--fsdp", type=int, default=0, metavar="N",
                         help="devices that parameters are split over (default: all)")
    command.add_argument("--expert", type=int, default=0, metavar="N",
                         help="devices of those that share the experts, to which tokens then "
                         "travel; 1 gathers experts (default: what takes less time by its bytes)")
    command.add_argument("--sequence", type=int, default=1, metavar="N",
                         help="devices that each sequence is split over (default: 1)")
    command.add_argument("--depth", type=int, default=0, metavar="N",
                         help="compile cuts of N and 2 N blocks and multiply out what the whole "
                         "takes: minutes in the place of half an hour (default: all blocks)")
    add_json(command)


def plan(options: Options) -> None:
    from engram_jax.costs import plan as plans

    planned = plans.plan(named_run(options), options.topology, options.fsdp, options.depth,
                         options.expert, options.sequence)
    print(planned.to_json() if options.json else plans.described(planned))
