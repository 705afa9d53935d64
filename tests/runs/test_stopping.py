"""SIGTERM and Ctrl-C at any moment of a run: it ends in good order, and goes on bit for bit."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from micro import STEPS, curve, outcome, with_data, with_training

from engram_jax import distributed
from engram_jax.cli.main import main
from engram_jax.errors import MachineError, Stopped
from engram_jax.runs import train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.metrics import Metrics

pytestmark = pytest.mark.usefixtures("compilations")
ROOT = pathlib.Path(__file__).parents[2]


def silent(line):
    del line


@pytest.fixture(scope="module")
def run(trained):
    return RunDirectory(trained).config()


def signalled(patch, owner, name, when, number=signal.SIGTERM):
    """Let the system send this process a signal in call number `when` of a function."""
    calls, before = [], getattr(owner, name)

    def wrapped(*words, **named):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), number)
        return before(*words, **named)

    patch.setattr(owner, name, wrapped)


MOMENTS = {  # where, of which call, and the step that is kept
    "in a step": (train.placement, "put", 3, 3),
    "while a row is logged": (Metrics, "log", 2, 3),
    "while a checkpoint is written": (Checkpoints, "save", 1, 3),
    "in the last step": (train.placement, "put", STEPS, STEPS),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_leaves_a_checkpoint_and_the_command_goes_on(
    run, trained, tmp_path, monkeypatch, moment, number
):
    if number == signal.SIGINT and moment != "in a step":
        pytest.skip("as SIGTERM")
    owner, name, when, kept = MOMENTS[moment]
    rare = with_training(run, checkpoint_every=0 if "written" not in moment else 3)
    said = []
    with monkeypatch.context() as patch:
        signalled(patch, owner, name, when, number)
        with pytest.raises(Stopped, match=f"stopped by {signal.Signals(number).name}") as stopped:
            train.train(rare, tmp_path, said.append)
    assert stopped.value.together
    assert f"goes on from step {kept}" in str(stopped.value)
    assert any("a second one stops at once" in line for line in said)
    assert not (tmp_path / "result.json").exists()
    assert not (tmp_path / "lock").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    said.clear()
    train.train(rare, tmp_path, said.append)
    assert f"micro: going on from step {kept}" in said
    assert curve(tmp_path) == curve(trained)
    assert outcome(tmp_path) == outcome(trained)


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_signal_in_an_evaluation(run, tmp_path, monkeypatch, batch):
    often = with_training(run, checkpoint_every=0, evaluate_every=4)
    train.train(often, tmp_path / "whole", silent)
    with monkeypatch.context() as patch:
        signalled(patch, sys.modules["engram_jax.runs.evaluate"], "put", batch)
        with pytest.raises(Stopped, match="after step 4; the same command goes on from step 4"):
            train.train(often, tmp_path / "run", silent)
    assert [row for row in curve(tmp_path / "run") if "evaluation/loss" in row] == []
    train.train(often, tmp_path / "run", silent)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_signal_while_text_is_packed(run, tmp_path, monkeypatch):
    mine = with_data(run, cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        signalled(patch, sys.modules["engram_jax.data.packing"], "pack", 1)
        with pytest.raises(Stopped, match=r"before the first step .* begins again") as stopped:
            train.train(mine, tmp_path / "run", silent)
    assert not stopped.value.together
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob(".making-*"))


def test_a_signal_while_a_checkpoint_is_read(run, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signalled(patch, train.placement, "put", 3)
        with pytest.raises(Stopped):
            train.train(run, tmp_path, silent)
    with monkeypatch.context() as patch:
        signalled(patch, Checkpoints, "restore", 1)
        with pytest.raises(Stopped, match="before the first step of this start"):
            train.train(run, tmp_path, silent)
    train.train(run, tmp_path, silent)
    assert curve(tmp_path) == curve(trained)


def test_a_signal_that_a_library_takes_for_a_failure_of_its_own(
    run, trained, tmp_path, monkeypatch
):
    """Orbax, asked what a checkpoint holds, swallows any exception and knows nothing then."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    read = Checkpoints.restore

    def swallowing(self, *words, **named):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        raise MachineError("the description of its arrays is damaged or missing")

    monkeypatch.setattr(Checkpoints, "restore", swallowing)
    with pytest.raises(Stopped, match="stopped by SIGTERM before the first step"):
        train.train(run, tmp_path / "run", silent)
    monkeypatch.setattr(Checkpoints, "restore", read)
    train.train(run, tmp_path / "run", silent)
    assert curve(tmp_path / "run") == curve(trained)


def test_the_command_has_an_exit_code_of_its_own(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engram_jax.cli.runs.named_run", lambda options: run)
    signalled(monkeypatch, train.placement, "put", 2)
    assert main(["train", "any", "--out", str(tmp_path)]) == 75
    [line] = capsys.readouterr().err.splitlines()
    assert line == ("engram-jax: stopped by SIGTERM after step 2; the same command goes on from "
                    "step 2")


LISTENER = """
import sys, time
from engram_jax.runs.stopping import Stopping

with Stopping(float(sys.argv[1]), print) as stopping:
    stopping.at_last(lambda: print("last words", flush=True))
    stopping.begin()
    print("ready", flush=True)
    time.sleep(60)  # a main thread that hears of nothing
"""


@pytest.mark.parametrize(("grace", "numbers", "apart", "code", "line"), [
    (0.5, [signal.SIGTERM], 0, 75, "did not come to an end within 0.5 s (training.grace_seconds)"),
    (60, [signal.SIGTERM] * 2, 1.3, 143, "ended at once by a second signal (SIGTERM)"),
    (2, [signal.SIGTERM] * 2, 0.1, 75, "did not come to an end within 2 s"),  # one, passed on
    pytest.param(60, [signal.SIGINT] * 2, 0.1, 130, "ended at once by a second signal (SIGINT)",
                 marks=pytest.mark.slow),
    (60, [signal.SIGTERM, signal.SIGINT], 0.1, 130, "ended at once by a second signal (SIGINT)"),
])
def test_a_main_thread_that_hears_nothing_is_ended(grace, numbers, apart, code, line):
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(grace)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(apart)
        out, error = process.communicate(timeout=30)
        assert time.monotonic() - begin < 20
    finally:
        process.kill()
    assert process.returncode == code, error
    assert line in error
    assert "last words" in out


TIDYING = """
import os, signal, time
from engram_jax.errors import Stopped
from engram_jax.runs.stopping import Stopping

try:
    with Stopping(60, print):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            print("tidied up")
except Stopped:
    print("stopped")
"""


def test_a_signal_passed_on_does_not_cut_short_what_is_tidied_up():
    """Such as half-packed text and the lock, before the first step."""
    process = subprocess.run(
        [sys.executable, "-c", TIDYING], text=True, capture_output=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1:] == ["tidied up", "stopped"]


class Store:
    """The key-value store of a few threads, each reading and writing when it pleases."""

    def __init__(self):
        self.lock, self.values = threading.Lock(), {}

    def key_value_set(self, name, value, allow_overwrite=False):
        time.sleep(random.random() / 2000)
        with self.lock:
            if name in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[name] = value

    def key_value_dir_get(self, folder):
        time.sleep(random.random() / 2000)
        with self.lock:
            return [item for item in self.values.items() if item[0].startswith(f"{folder}/")]


def lockstep(monkeypatch, asked, pieces=30):
    """Where each of some processes stops, which read a piece's result while the next one runs.

    Args:
      asked: for each process the piece before which it is told to stop; None never.
    """
    store, ends = Store(), [pieces + 1] * len(asked)
    done = [threading.Barrier(len(asked)) for _ in range(pieces + 1)]

    class Group:
        client = store

        def under(self, folder):
            return {int(key.rsplit("/", 1)[1]): value
                    for key, value in store.key_value_dir_get(folder)}

    monkeypatch.setattr(distributed, "_group", Group())

    def work(process):
        started = []
        for piece in range(1, pieces + 1):
            told = asked[process] is not None and piece >= asked[process]
            if distributed.stops(piece, told):
                ends[process] = piece
                break
            thread = threading.Thread(target=done[piece].wait, args=(5,))
            thread.start()  # the piece, which needs all processes
            started.append(thread)
            if len(started) > 1:
                started[-2].join()  # the one before it
            time.sleep(random.random() / 3000)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("seed", range(12))
def test_processes_stop_before_the_same_piece(monkeypatch, seed):
    random.seed(seed)
    asked = [random.choice([None, random.randint(1, 20)]) for _ in range(3)]
    ends = lockstep(monkeypatch, asked)
    assert len(set(ends)) == 1, (asked, ends)
    told = [piece for piece in asked if piece]
    assert ends[0] == (min(told) + distributed.AHEAD if told else 31)


def test_of_two_pieces_that_were_named_the_first_counts(monkeypatch):
    class Group:
        client = None

        def under(self, folder):
            return {7: "", 5: ""}

    monkeypatch.setattr(distributed, "_group", Group())
    assert [distributed.stops(piece, asked=True) for piece in (4, 5, 6)] == [False, True, True]
