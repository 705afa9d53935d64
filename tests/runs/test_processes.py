"""Two processes of four CPU devices each: they agree, wait for each other, and never hang."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import object_store
import pytest
from micro import STEPS, micro, plain, with_data, with_model, write_text

from engram_jax import distributed
from engram_jax.cli import main
from engram_jax.data.batches import train_batches
from engram_jax.errors import UserError
from engram_jax.runs import train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import open_inputs
from engram_jax.settings import to_dict
from engram_jax.training import placement

HERE = pathlib.Path(__file__).parents[1]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started(words, numbers=(0, 1), out="unused", **environment):
    """The processes `numbers` of two, running."""
    port = free_port()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "ENGRAM_MESH": "2x4",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
           "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), **environment}
    made = [subprocess.Popen(
        [sys.executable, str(HERE / "peer.py"), "train", "tiny", "--out", out,
         "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(number),
         *(words[number] if isinstance(words, dict) else words)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for number in numbers]
    try:
        yield made
    finally:
        for process in made:
            process.kill()
            process.communicate()


def ended(process, within):
    """Exit code, standard output, and what is ours of standard error."""
    out, error = process.communicate(timeout=within)
    ours = [line for line in error.splitlines() if line.startswith("engram-jax: ")]
    return process.returncode, out, ours, error


def test_processes_work_together_and_one_talks():
    with started([]) as made:
        (code, out, _, error), (other_code, other_out, _, other_error) = (
            ended(process, 60) for process in made)
    assert (code, other_code) == (0, 0), error + other_error
    assert "exchange 19" in out
    assert "loss 0.0000" in out
    assert "exchange" not in other_out
    times = [float(re.search(r"packed by \d at ([\d.]+)", text)[1]) for text in (out, other_out)]
    assert times[0] < times[1]


@pytest.mark.slow
def test_settings_that_differ_are_refused_by_all():
    words = {0: ["--set", "training.steps=7"], 1: ["--set", "training.steps=8"]}
    with started(words) as made:
        for process in made:
            code, _, ours, error = ended(process, 60)
            assert code == 2, error
            [line] = ours
            assert "training.steps = 8 in process 1, but 7 in process 0" in line


@pytest.mark.slow
def test_a_killed_process_ends_the_other():
    with started(["--timeout", "5"], PEER_WHO="1", PEER_DOES="die") as made:
        code, _, ours, error = ended(made[0], 30)
        assert made[1].wait(10) == -signal.SIGKILL
    assert code == 1, error
    [line] = ours  # of the exchange that broke, or of the watch where gloo waits for the dead
    assert re.search(r"lost another process .*timeout of a silent one: 5 s"
                     r"|process 1 has been silent for 5 s \(timeout\)", line)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_failure_is_told_to_the_other(who):
    with started([], PEER_WHO=str(who), PEER_DOES="disk_full") as made:
        answers = [ended(process, 60) for process in made]
    assert [answer[0] for answer in answers] == [1, 1], answers
    assert answers[who][2] == ["engram-jax: the disk is full"]
    assert answers[1 - who][2] == [f"engram-jax: process {who} failed: the disk is full"]


@pytest.mark.slow
def test_a_bug_shows_where_it_is():
    with started([], PEER_WHO="1", PEER_DOES="bug") as made:
        answers = [ended(process, 60) for process in made]
    assert [answer[0] for answer in answers] == [1, 1], answers
    assert "in bug" in answers[1][3]
    assert answers[0][2] == ["engram-jax: process 1 failed: a bug"]


@pytest.mark.slow
def test_a_silent_process_ends_the_other():
    with started(["--timeout", "4"], PEER_WHO="1", PEER_DOES="hang") as made:
        code, _, ours, error = ended(made[0], 60)
    assert code == 1, error
    assert ours == ["engram-jax: process 1 has been silent for 4 s (timeout): it died or hangs, or "
                    "its machine is gone"]


@pytest.mark.slow
def test_the_others_end_with_the_first():
    with started([], PEER_WHO="0", PEER_DOES="die") as made:
        code, _, _, error = ended(made[1], 60)
    assert code in (1, -signal.SIGABRT), error  # JAX's runtime may be quicker: it aborts


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_in_a_bucket(tmp_path):
    run = plain(micro(write_text(tmp_path / "text.txt")))
    memory = dataclasses.replace(run.model.engram, shards=8)
    run = with_data(with_model(run, engram=memory), batch_size=8,
                    cache_dir="gs://two-processes/cache")
    with object_store.ObjectStore() as store:
        settings = {**store.environment(), "PEER_RUN": json.dumps(to_dict(run)),
                    "ENGRAM_CACHE": str(tmp_path),
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
        words = ["--timeout", "20"]
        with started(words, out="gs://two-processes/run", **settings) as made:
            while "two-processes/run/checkpoints/3/commit_success.txt" not in store.objects:
                assert made[1].poll() is None, ended(made[1], 1)
                time.sleep(0.01)
            made[1].kill()
            code, _, ours, error = ended(made[0], 120)
            assert (code, len(ours)) == (1, 1), error
        assert "two-processes/run/result.json" not in store.objects
        with started(words, out="gs://two-processes/run", **settings) as made:
            (code, out, _, error), (other, _, _, other_error) = (
                ended(process, 240) for process in made)
        assert (code, other) == (0, 0), error + other_error
        assert re.search("going on from step [36]", out)
        rows = [json.loads(line) for name in sorted(store.objects) if "/run/metrics-" in name
                for line in store.objects[name].decode().splitlines()]
        steps = [row["step"] for row in rows if "learning/loss" in row]
        assert json.loads(store.objects["two-processes/run/result.json"])["steps"] == STEPS
        assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_two_processes_train_as_one_and_leave_its_checkpoint(tmp_path):
    run = plain(micro(write_text(tmp_path / "text.txt")))
    memory = dataclasses.replace(run.model.engram, shards=24, signed_root=False)
    run = with_data(with_model(run, engram=memory), batch_size=24)
    settings = {"PEER_RUN": json.dumps(to_dict(run)), "ENGRAM_CACHE": str(tmp_path)}
    with started([], out=str(tmp_path / "two"), **settings) as made:
        for process in made:
            code, _, _, error = ended(process, 240)
            assert code == 0, error
    train.train(run, tmp_path / "one", print, placement.make_mesh(1, 1))
    losses = {place: [row["learning/loss"] for row in RunDirectory(tmp_path / place).metrics()
                      if "learning/loss" in row] for place in ("one", "two")}
    assert len(losses["one"]) == STEPS
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)
    prints = open_inputs(run).fingerprints()
    found = {}
    for shape in ((1, 1), (1, 3), (2, 2), (4, 2)):
        with Checkpoints(RunDirectory(tmp_path / "two").checkpoints, 2, prints) as checkpoints:
            batches = train_batches(open_inputs(run).tokens, run.data)
            state = checkpoints.restore(
                placement.placed_state(run, placement.make_mesh(*shape)), batches)
        assert batches.get_state() == {"next_index": STEPS}
        found[shape] = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), state)
    assert all(one == found[1, 1] for one in found.values())


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_never_comes(number):
    begin = time.monotonic()
    with started(["--timeout", "3"], numbers=(number,)) as made:
        code, _, ours, error = ended(made[0], 60)
    assert code == 1, error
    [line] = ours
    assert re.search(r"not all processes came to 127\.0\.0\.1:\d+ within 3 s", line)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(("settings", "line"), [
    ((None, 2, 0), "coordinator: is missing"),
    (("host:1", 2, None), "process: is missing"),
    (("host", 2, 0), r"coordinator = 'host': must be HOST:PORT"),
    (("host:1", 2, 2), "process = 2: must be 0 to 1"),
    ((None, None, None), "no cluster could be detected"),
])
def test_settings_of_the_group(settings, line, monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=line):
        distributed.start(*settings)


def refuse(*words, **settings):
    raise ValueError("coordinator_address should be defined.")


def test_one_process_waits_for_nobody(capsys):
    assert distributed.is_first()
    distributed.barrier("alone")
    distributed.agree("alone", {"a": 1})
    with distributed.after_first("alone"):
        pass
    assert main.main(["train", "tiny", "--out", "x", "--processes", "2"]) == 2
    assert capsys.readouterr().err == (
        "engram-jax: coordinator: is missing; coordinator, processes and process go together\n")
