"""What several commands have in common: their parser, their shared options, the run they name."""

import argparse
import functools
import shutil
import sys
import typing

SET_HELP = ("change a field of the config, for example --set training.steps=100 or "
            "--set data.path=my.txt; may be repeated (all fields: engram-jax fields)")

Commands: typing.TypeAlias = "argparse._SubParsersAction[Parser]"
Options: typing.TypeAlias = argparse.Namespace
Deed: typing.TypeAlias = typing.Callable[[Options], int | None]


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_command(commands: Commands, deed: Deed, summary: str, example: str, name: str = ""
                ) -> Parser:
    """Add the command that has the name of its `deed`, the function that does it, or `name`.

    The deed gets the options and returns an exit code; None is 0.
    """
    command = commands.add_parser(
        name or deed.__name__, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"Example: engram-jax {example}")
    command.set_defaults(deed=deed)
    return command


def keeping_programs(deed: Deed) -> Deed:
    """The deed with its compiled programs kept on disk, and taken from there the next time.

    The code is the same, so are its bits; $JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """

    @functools.wraps(deed)
    def kept(options: Options) -> int | None:
        from engram_jax.sweeps.compilations import kept_compilations

        with kept_compilations():
            return deed(options)

    return kept


def add_set(command: Parser) -> None:
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                         dest="settings", help=SET_HELP)


def add_json(command: Parser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_mesh(command: Parser, default: str = "all devices as 1xN") -> None:
    command.add_argument("--mesh", metavar="DATAxFSDP[xEXPERT[xSEQUENCE]]", default=None,
                         help="split tables over all axes, batches over the first three, "
                         "parameters over the second and third; tokens travel to experts along "
                         "the third, each sequence is split over the fourth; default "
                         f"$ENGRAM_MESH, or else {default}")


def add_directory(command: Parser) -> None:
    command.add_argument("directory", metavar="DIR", help="a run's folder")


def add_directories(command: Parser) -> None:
    command.add_argument("directories", metavar="DIR", nargs="+",
                         help="a run's folder, or one that holds such, as a sweep's")


def program() -> str:
    """This command as the user can type it: with its folder if that is not on the path."""
    name = "engram-jax"
    return sys.argv[0] if sys.argv[0].endswith(name) and not shutil.which(name) else name


def say(line: str) -> None:
    print(line, flush=True)
