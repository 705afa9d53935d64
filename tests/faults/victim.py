"""A process that has imported everything and forks a training run whenever it is told to.

A line of JSON on standard input starts a run: its folder, its config, more words of the command,
and what to limit. Standard output gets "started PID", "phase PID NAME" as the run enters a phase,
and "ended PID CODE".
"""

import json
import os
import pathlib
import resource
import select
import sys
import traceback

from micro import keep_compilations

from engram_jax.cli import runs
from engram_jax.cli.main import main
from engram_jax.data import packing
from engram_jax.runs import train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.settings import from_dict

PHASES = {"saving": (Checkpoints, "save"), "restoring": (Checkpoints, "restore"),
          "packing": (packing, "pack"), "stepping": (train.placement, "put")}
PIPE = os.dup(1)  # standard output itself is for libraries that talk


def tell(*words):
    os.write(PIPE, (" ".join(map(str, words)) + "\n").encode())  # so short that it is one piece


def announced(owner, name, phase):
    """A function that says that its phase begins."""
    before = getattr(owner, name)

    def wrapped(*words, **named):
        tell("phase", os.getpid(), phase)
        return before(*words, **named)

    return wrapped


class Roomy:
    """Standard error on a disk of its own, with room: lifts the limit while it writes."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, limit[1]))
        self._stream.write(text)
        self._stream.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def child(order):
    os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    for phase, (owner, name) in PHASES.items():
        setattr(owner, name, announced(owner, name, phase))
    os.environ.update(order.get("environment", {}))
    if "fsize" in order:  # no file may be longer: a full disk, as far as a file is concerned
        sys.stderr = Roomy(sys.stderr)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["fsize"], resource.RLIM_INFINITY))
    config = json.loads(pathlib.Path(order["config"]).read_text())
    runs.named_run = lambda options: from_dict(config)
    sys.stdout = sys.stderr  # the pipe is for what this file tells
    try:
        code = main(["train", "any", "--out", order["out"], *order.get("words", [])])
    except BaseException:
        traceback.print_exc()
        code = 99  # a traceback: nobody's fault but ours
    sys.stderr.flush()
    os._exit(code)


def reap():
    """Tell of the runs that have ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.remove(pid)
            tell("ended", pid, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    keep_compilations(os.environ["COMPILED"])
    running, rest = set(), b""
    while True:  # in one thread: a fork in the middle of another's work might hold its locks
        ready, _, _ = select.select([0], [], [], 0.01)
        reap()
        if not ready:
            continue
        if not (data := os.read(0, 65536)):
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if (pid := os.fork()) == 0:
                child(json.loads(line))
            running.add(pid)
            tell("started", pid)
