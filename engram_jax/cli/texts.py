"""The command that prepares text for training: `pack`."""

import dataclasses

from engram_jax.cli.models import add_recipe, named_run
from engram_jax.cli.words import Commands, Options, add_command, add_json, say
from engram_jax.settings import json_text


def add(commands: Commands) -> None:
    command = add_command(
        commands, pack,
        "tokenize a run's text into token shards, once, and print where they are; training does "
        "the same by itself, this does it beforehand and needs no accelerator",
        "pack tiny --set data.path=my.jsonl.gz")
    add_recipe(command)
    command.add_argument("--processes", type=int, default=0, metavar="N",
                         help="to tokenize in, default one for each core; the shards are the same")
    add_json(command)


def pack(options: Options) -> None:
    from engram_jax.config import require
    from engram_jax.data.tokens import open_tokens

    require(options.processes >= 0, "--processes", options.processes, "must not be negative")
    tell = (lambda line: None) if options.json else say
    data = open_tokens(named_run(options).data, tell, options.processes)
    if options.json:
        print(json_text(dataclasses.asdict(data), indent=1))
        return
    print(f"{data.documents:,} documents; {data.train_tokens:,} tokens to train on, "
          f"{data.validation_tokens:,} to validate on (the rule: {data.split})")
    print(data.directory)
