"""A command that many processes give together: the words for it, joining and leaving."""

import contextlib
import traceback
from collections.abc import Callable, Iterator

from engram_jax.cli.endings import ending, one_line
from engram_jax.cli.words import Options, Parser, say
from engram_jax.errors import Stopped


def add_processes(command: Parser) -> None:
    group = command.add_argument_group(
        "many processes", "the same command in each, all with the same settings; see "
        "docs/clusters.md")
    group.add_argument("--distributed", action="store_true",
                       help="find the others: Cloud TPU, Slurm, Kubernetes, Open MPI")
    group.add_argument("--coordinator", metavar="HOST:PORT",
                       help="where process 0 is, on a cluster that is not found by itself")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 on")
    group.add_argument("--timeout", type=int, default=300, metavar="SECONDS",
                       help="give up on processes that do not come in time (default 300)")


@contextlib.contextmanager
def joined(options: Options) -> Iterator[Callable[[str], None]]:
    """Join the other processes, if there are any, for what is within; yields what talks."""
    from engram_jax import distributed

    if not is_one_of_many(options):
        yield say
        return
    distributed.start(options.coordinator, options.processes, options.process, options.timeout)
    try:
        yield distributed.first_only(say)
        distributed.stop()
    except BaseException as error:  # the others must hear of it, and an exit would wait for them
        if isinstance(error, Stopped) and error.together:
            distributed.stop()
            raise
        last = ending(error)
        if last is None and (line := distributed.lost(error)):
            last = 1, line
        if last is None:
            traceback.print_exc()
            last = 1, one_line(error)
        distributed.leave(*last)


def is_one_of_many(options: Options) -> bool:
    named = options.coordinator, options.processes, options.process
    return options.distributed or named != (None, None, None)
