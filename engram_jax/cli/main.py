"""The command line: `engram-jax COMMAND --help` teaches each command.

Each family of commands is a file beside this one, and in it each command's words stand above its
deed; to add a command, write both there and name it in the family's `add`.

Exit codes: 0 done, 1 the machine failed (disk, memory) or a run diverged, 2 the user can mend it,
75 told to stop and stopped in good order; the reason is one line on standard error. `reproduce`
ends with 1, too, where the second run differs, and `verify` where something is damaged.
"""

import sys
from collections.abc import Sequence

from engram_jax import __version__
from engram_jax.cli import (
    benchmarks,
    evaluation,
    fields,
    models,
    released,
    results,
    runs,
    serving,
    sweeps,
    texts,
)
from engram_jax.cli.endings import ending
from engram_jax.cli.words import Parser
from engram_jax.quiet import quieten
from engram_jax.settled import settle_sums

FAMILIES = (models, fields, texts, runs, evaluation, sweeps, results, serving, released,
            benchmarks)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(words)
    quieten()
    if words is None:  # this process is the command's own
        settle_sums()
    try:
        return options.deed(options) or 0
    except (Exception, KeyboardInterrupt) as error:
        if (last := ending(error)) is None:
            raise
        code, line = last
        if line:
            print(f"engram-jax: {line}", file=sys.stderr)
        return code


def parser() -> Parser:
    """The parser of every command."""
    top = Parser(
        prog="engram-jax",
        description="Engram: conditional memory for language models, on JAX meshes.",
        epilog="Start with: engram-jax describe tiny; engram-jax sweep memory_scaling --out runs")
    top.add_argument("--version", action="version", version=f"engram-jax {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for family in FAMILIES:
        family.add(commands)
    return top
