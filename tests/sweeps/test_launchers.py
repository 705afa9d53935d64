"""Launchers of sweeps: a Ray cluster gives what this process gives, whatever is killed."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import psutil
import pytest
from micro import STEPS, micro, plain, with_data, with_training, write_text

from engram_jax import __version__
from engram_jax.cli import main
from engram_jax.errors import MachineError, Stopped, UserError
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import changed, to_dict
from engram_jax.sweeps import at_once, launchers, ray_launcher, ray_tasks, sweep
from engram_jax.sweeps.at_once import AtOnce
from engram_jax.sweeps.ray_launcher import RayLauncher, parsed_resources

pytestmark = [
    pytest.mark.usefixtures("compilations"),
    # Ray starts its cluster by fork and exec, which JAX cannot tell from fork alone.
    pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning"),
]


def silent(line):
    del line


class Results(list):
    """The results of runs, and where they lie."""

    place: pathlib.Path


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    base = plain(micro(text, checkpoint_every=2))
    return [dataclasses.replace(with_training(base, seed=seed), name=f"seed-{seed}")
            for seed in (0, 1)]


@pytest.fixture(scope="module")
def alone(two_runs, tmp_path_factory):
    """The results of the local launcher."""
    place = tmp_path_factory.mktemp("local")
    results = Results(launchers.local(two_runs, place, silent))
    results.place = place
    return results


@pytest.fixture(scope="module")
def cluster(compilations):
    """A cluster of two CPUs, whose workers compile as this process does."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilations))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def losses(results):
    return [(result["name"], result["loss"]) for result in results]


def logged(place, runs):
    """The losses of every step of every run."""
    return [[row["learning/loss"] for row in RunDirectory(place / run.name).metrics()
             if "learning/loss" in row] for run in runs]


@pytest.mark.slow
def test_a_cluster_trains_what_this_process_trains(cluster, two_runs, alone, tmp_path):
    said = []
    launch = RayLauncher(resources={"CPU": 1})
    found = launch(two_runs, tmp_path, said.append)
    assert losses(found) == losses(alone)
    assert said[0] == "ray: 2 runs, CPU=1 each, on 1 nodes"
    for run in two_runs:
        assert f"{run.name}: steps 1 to {STEPS} (the first one compiles)" in said
        assert RunDirectory(tmp_path / run.name).result() in found


def killed(run, place, step):
    """Kill the worker that trains `run` once the checkpoint of `step` is there; a thread."""
    def wait_and_kill():
        while not (place / run.name / "config.json").exists():
            time.sleep(0.01)
        [worker] = [child for child in psutil.Process().children(recursive=True)
                    if f"ray::{run.name}" in " ".join(child.cmdline())]
        while not (place / run.name / "checkpoints" / str(step)).exists():
            time.sleep(0.002)
        worker.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(cluster, two_runs, alone, tmp_path):
    said = []
    thread = killed(two_runs[0], tmp_path, 2)
    found = RayLauncher(resources={"CPU": 1})(two_runs, tmp_path, said.append)
    thread.join()
    assert any(line.startswith("seed-0: going on from step") for line in said)
    assert losses(found) == losses(alone)
    assert logged(tmp_path, two_runs) == logged(alone.place, two_runs)


@pytest.mark.slow
def test_a_worker_that_is_lost_too_often_ends_the_sweep(cluster, two_runs, tmp_path):
    thread = killed(two_runs[0], tmp_path, 2)
    with pytest.raises(MachineError, match=r"seed-0: lost its worker too often .*goes on from"):
        RayLauncher(resources={"CPU": 2}, retries=0)(two_runs[:1], tmp_path, silent)
    thread.join()


def test_what_the_user_can_mend_ends_the_sweep_with_its_line(cluster, two_runs, tmp_path):
    bad = with_data(two_runs[0], path="/nowhere/at/all")
    with pytest.raises(UserError, match=r"^data.path = '/nowhere/at/all': does not exist;"):
        RayLauncher()([bad], tmp_path, silent)


def test_finished_runs_need_no_cluster(two_runs, alone, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = []
    assert RayLauncher()(two_runs, alone.place, said.append) == list(alone)
    assert [line.split(":")[0] for line in said] == ["seed-0", "seed-1"]
    longer = with_training(two_runs[0], steps=STEPS + 1)
    with pytest.raises(UserError, match=f"training.steps = {STEPS + 1}: .* holds a run with"):
        RayLauncher()([longer], alone.place, silent)


def test_ray_may_be_missing(two_runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"launcher = 'ray': needs Ray; pip install 'engram_jax\["):
        RayLauncher()(two_runs, tmp_path, silent)


@pytest.mark.parametrize(("address", "line"), [
    ("127.0.0.1:1", "ray-address = '127.0.0.1:1': nobody listens there"),
    ("ray://127.0.0.1:10001", "is of the Ray Client"),
])
def test_a_cluster_that_is_not_there(address, line, two_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("ray"), "is_initialized", lambda: False)
    with pytest.raises(UserError, match=line):
        RayLauncher(address=address)(two_runs, tmp_path, silent)


def test_a_task_checks_its_node():
    with pytest.raises(UserError, match=r"engram_jax = .*, but 0\.0 started the sweep"):
        ray_tasks.train_here({}, "/", None, "0.0", None)
    with pytest.raises(UserError, match=r"out = '/nowhere': is not there on .* all nodes see"):
        ray_tasks.train_here({}, "/nowhere", None, __version__, None)


def test_a_task_settles_its_sums_before_devices_and_keeps_its_programs(
    two_runs, tmp_path, monkeypatch
):
    done = []

    @contextlib.contextmanager
    def kept():
        done.append("kept")
        yield
        done.append("noted")

    monkeypatch.setattr(ray_tasks, "settle_sums", lambda: done.append("sums"))
    monkeypatch.setattr(ray_tasks, "chosen_mesh", lambda shape: done.append("devices"))
    monkeypatch.setattr(ray_tasks, "kept_compilations", kept)
    monkeypatch.setattr(ray_tasks, "result_of", lambda *words: done.append("trained"))
    ray_tasks.train_here(to_dict(two_runs[0]), str(tmp_path), None, __version__, None)
    assert done == ["sums", "devices", "kept", "trained", "noted"]


@pytest.mark.parametrize(("nodes", "needs"), [
    ([{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1e9}], {"CPU": 4.0}),
    ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 8.0}], {"CPU": 1, "GPU": 1}),
    ([{"CPU": 64.0}, {"CPU": 200.0, "TPU": 4.0, "TPU-v6e-8-head": 1.0}], {"CPU": 1, "TPU": 4.0}),
    ([], {"CPU": 1}),
])
def test_what_a_run_takes_of_a_node(nodes, needs):
    assert ray_launcher._share_of_node(nodes) == needs


def test_resources_as_words():
    assert parsed_resources("") == {}
    assert parsed_resources("CPU=4, GPU=0.5,TPU-v6e-8-head=1") == {
        "CPU": 4, "GPU": 0.5, "TPU-v6e-8-head": 1}
    for text in ("GPU", "GPU=", "=1", "GPU=x", "GPU=0", "GPU=1.5", "GPU=inf", "CPU=1,,GPU=1"):
        with pytest.raises(UserError, match=re.escape(f"resources = {text!r}: must be NAME=")):
            parsed_resources(text)


# --- Runs side by side on one machine ---


@pytest.fixture
def as_here(compilations, monkeypatch):
    """Other processes compile as this one does."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilations))


def both_train(place):
    return len(list(place.glob("*/metrics.jsonl"))) == 2


def one_is_done(place):
    return both_train(place) and (place / "seed-0/result.json").exists()


def signalled(place, number, who, when=both_train):
    """Send a signal once runs have come so far; a thread."""
    def wait_and_send():
        while not when(place):
            time.sleep(0.01)
        os.kill(who(), number)

    thread = threading.Thread(target=wait_and_send, daemon=True)
    thread.start()
    return thread


def rare(run, **settings):
    """A long run whose only checkpoint is that of where it is told to stop."""
    return with_training(run, **{"steps": 4000, "checkpoint_every": 4000, **settings})


def steps_kept(place):
    """Whether the last step of each run that began is in a checkpoint, by name."""
    return {path.parent.name: (RunDirectory(path.parent).metrics()[-1]["step"]
                               == max(map(int, os.listdir(path.parent / "checkpoints")), default=0))
            for path in place.glob("*/metrics.jsonl")}


def workers():
    return [child for child in psutil.Process().children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_runs_at_once_are_stopped_together_and_go_on_to_the_same_bits(
    as_here, two_runs, alone, tmp_path, capfd
):
    launch, said = AtOnce(count=2), []
    place = tmp_path / "longer"
    longer = [dataclasses.replace(rare(run, seed=seed), name=f"{run.name}-{seed}")
              for seed in (0, 1, 2) for run in two_runs]
    thread = signalled(place, signal.SIGTERM, os.getpid)
    with pytest.raises(Stopped, match="SIGTERM; the same command goes on"):
        launch(longer, place, said.append)
    thread.join()
    assert not workers()
    assert steps_kept(place) == {"seed-0-0": True, "seed-1-0": True}, "and no other has begun"
    assert losses(launch(two_runs, tmp_path, said.append)) == losses(alone)
    assert logged(tmp_path, two_runs) == logged(alone.place, two_runs)
    assert re.fullmatch(r"seed-[01]: done, loss .*; 2 of 2", said[-1])
    told = capfd.readouterr()
    assert f"seed-1: steps 1 to {STEPS} (the first one compiles)" in told.out
    assert not told.err


@pytest.mark.slow
def test_a_process_that_is_lost_ends_the_sweep_and_the_others(as_here, two_runs, tmp_path):
    longer = [rare(run, seed=0) for run in two_runs]
    thread = signalled(tmp_path, signal.SIGKILL, lambda: workers()[0].pid)
    with pytest.raises(MachineError, match=r"a process of the sweep was lost .*goes on from the"):
        AtOnce(count=2)(longer, tmp_path, silent)
    thread.join()
    assert not workers()
    assert sorted(steps_kept(tmp_path).values()) == [False, True], "of the lost, of the other"


@pytest.mark.slow
def test_a_process_without_work_takes_no_run_with_it(as_here, two_runs, tmp_path):
    runs = [two_runs[0], rare(two_runs[1])]
    thread = signalled(tmp_path, signal.SIGTERM, os.getpid, one_is_done)
    with pytest.raises(Stopped):
        AtOnce(count=2)(runs, tmp_path, silent)
    thread.join()
    assert steps_kept(tmp_path) == {"seed-0": True, "seed-1": True}


ALONE = """
import sys
from engram_jax.settings import from_dict
from engram_jax.sweeps.at_once import AtOnce
from etils import epath
import json

if __name__ == "__main__":
    runs = [from_dict(values) for values in json.loads(sys.argv[1])]
    AtOnce(count=2)(runs, epath.Path(sys.argv[2]), print)
"""


@pytest.mark.slow
def test_runs_end_with_the_process_that_started_them(as_here, two_runs, tmp_path):
    place = tmp_path / "runs"
    longer = [dataclasses.replace(rare(run, seed=seed), name=f"{run.name}-{seed}")
              for seed in (0, 1, 2) for run in two_runs]
    (tmp_path / "alone.py").write_text(ALONE)
    command = subprocess.Popen([sys.executable, str(tmp_path / "alone.py"), json.dumps(
        [to_dict(run) for run in longer]), str(place)], stdout=subprocess.DEVNULL)
    signalled(place, signal.SIGKILL, lambda: command.pid).join()
    others = psutil.Process(command.pid).children(recursive=True)
    command.wait()
    assert not psutil.wait_procs(others, timeout=60)[1]
    assert steps_kept(place) == {"seed-0-0": True, "seed-1-0": True}, "and no other has begun"


TOLD = """
import os, signal, sys, time
from engram_jax.errors import Stopped
from engram_jax.sweeps import at_once

def told_again(worker, join=at_once._Worker.join):
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGTERM)
    join(worker)

if __name__ == "__main__":
    at_once._Worker.join = told_again
    try:
        with at_once._workers(1) as workers:
            workers[0].ask(time.sleep, 60)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    except Stopped:
        sys.exit(75)
"""


@pytest.mark.parametrize(("apart", "code"), [
    (0.1, 75), pytest.param(1.2, -signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_first_process_takes_what_is_passed_on_for_one_signal(tmp_path, apart, code):
    """As `timeout` tells its command, and then the group that it is in."""
    (tmp_path / "told.py").write_text(TOLD)
    assert subprocess.run(
        [sys.executable, str(tmp_path / "told.py"), str(apart)], timeout=60,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path.cwd())}).returncode == code


def test_what_the_user_can_mend_ends_runs_at_once_with_its_line(as_here, two_runs, tmp_path):
    bad = [with_data(run, path="/nowhere/at/all") for run in two_runs]
    with pytest.raises(UserError, match=r"^data.path = '/nowhere/at/all': does not exist;"):
        AtOnce(count=2)(bad, tmp_path, silent)
    assert not workers()


def test_runs_that_do_not_fit_are_refused_where_the_devices_are(two_runs, tmp_path):
    large = changed(two_runs[0], {"model.engram.rows_per_head": [5 * 10**8, 5 * 10**8]})
    with pytest.raises(UserError, match=r"^run = 'seed-0': needs .* GB without activations"):
        AtOnce(count=2)([large], tmp_path, silent)
    assert not (tmp_path / "seed-0").exists()


def test_an_error_of_a_library_s_own_kind_reaches_the_first_process():
    class Odd(RuntimeError):
        def __init__(self, one, two):
            super().__init__(f"RESOURCE_EXHAUSTED: {one} {two}")

    try:
        raise Odd(1, 2)
    except Odd as error:
        told = at_once._portable(error)
    assert str(told) == "Odd: RESOURCE_EXHAUSTED: 1 2"
    assert "raise Odd(1, 2)" in told.__notes__[0]
    line = "stopped"
    assert type(at_once._portable(Stopped(line))) is Stopped


def test_the_first_seed_comes_first_and_its_longest_run(two_runs, monkeypatch, tmp_path):
    begun = []

    class Worker:
        busy = False

        def __init__(self):
            self.pipe, theirs = multiprocessing.Pipe()
            theirs.close()  # so that `wait` takes it for ready

        def ask(self, task, *arguments):
            self.busy = task is at_once._train
            if self.busy:
                self.name = arguments[0]["name"]
                begun.append(self.name)

        def answer(self):
            self.busy = False
            return {"name": getattr(self, "name", ""), "loss": 1.0}

    monkeypatch.setattr(at_once, "_workers", lambda count: contextlib.nullcontext(
        [Worker() for _ in range(count)]))
    first, second = two_runs
    long = dataclasses.replace(with_training(first, steps=STEPS + 1), name="long")
    results = AtOnce(count=2)([second, first, long], tmp_path, silent)
    assert begun == ["long", "seed-0", "seed-1"]
    assert [result["name"] for result in results] == ["seed-1", "seed-0", "long"]


def test_how_many_at_once_as_words(capsys, tmp_path):
    words = ["sweep", "allocation", "--out", str(tmp_path)]
    for added, line in [
        (["--at-once", "0"], "at-once = 0: must be at least 1"),
        (["--at-once", "2", "--launcher", "ray"], "at-once = 2: is for launcher = 'local'; Ray"),
        (["--at-once", "2", "--distributed"], "at-once = 2: starts the processes itself; leave"),
    ]:
        assert main.main([*words, *added]) == 2
        assert capsys.readouterr().err.startswith(f"engram-jax: {line}")


# --- Jobs that share a sweep ---


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_together_are_every_run_once(count):
    runs = ["a", "b", "c", "d", "e"]
    shares = [launchers.share(runs, index, count) for index in range(count)]
    assert sorted(run for share in shares for run in share) == runs
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_as_words():
    assert launchers.parsed_share("3/12") == (3, 12)
    for text in ("", "3", "3/", "a/2", "-1/2", "1/2/3"):
        with pytest.raises(UserError, match=re.escape(f"only = {text!r}: must be INDEX/COUNT")):
            launchers.parsed_share(text)
    for index, count in ((2, 2), (0, 0)):
        with pytest.raises(UserError, match=f"only = '{index}/{count}': .* from 0 to COUNT - 1"):
            launchers.share(["a"], index, count)


def test_launchers_by_name():
    launch, mesh = launchers.chosen("local", "2x4")
    assert (launch, mesh.size) == (launchers.local, 8)
    assert launchers.chosen("ray", "2x4", "host:1", "GPU=1") == (
        RayLauncher(address="host:1", resources={"GPU": 1.0}, mesh="2x4"), None)
    with pytest.raises(UserError, match="launcher = 'slurm': must be one of local, ray"):
        launchers.chosen("slurm")
    with pytest.raises(UserError, match="resources = 'GPU=1': is for launcher = 'ray' only"):
        launchers.chosen("local", resources="GPU=1")


@pytest.fixture
def finished(two_runs, alone, monkeypatch, tmp_path):
    """A folder in which all runs of the experiment "two" are done; no table yet."""
    experiment = types.SimpleNamespace(
        SCALES=("tiny",), runs=lambda scale, seeds: two_runs, FIGURE="figure.png",
        table=lambda results: f"{len(results)} runs", figure=lambda results: None)
    monkeypatch.setattr(sweep, "experiments", lambda: ["two"])
    monkeypatch.setattr(sweep, "_module", lambda name, part: experiment)
    monkeypatch.setattr(sweep, "save", lambda figure, path: None)
    shutil.copytree(alone.place, tmp_path / "sweep")
    return tmp_path / "sweep"


def test_shares_make_no_table_until_all_are_done(alone, finished):
    def swept(**words):
        return sweep.run_sweep(
            sweep.Sweep(experiment="two"), finished, silent, allow_dirty=True, **words)

    assert [swept(only=(index, 2)) for index in (0, 1)] == [[alone[0]], [alone[1]]]
    assert not (finished / "table.txt").exists()
    assert swept() == list(alone)
    assert (finished / "table.txt").read_text() == "2 runs\n"


def test_the_command_line_chooses_launcher_and_share(finished, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["sweep", "two", "--out", str(finished), "--allow-dirty"]
    assert main.main([*words, "--only", "1/2"]) == 0
    out = capsys.readouterr().out
    assert "run 1 of 1: seed-1" in out
    assert "1 runs of these are done; --so-far makes the table of what is done, and the " in out
    assert main.main([*words, "--launcher", "ray", "--resources", "CPU=1"]) == 0
    out = capsys.readouterr().out
    assert "run 1 of" not in out
    assert "2 runs" in out
    shutil.rmtree(finished / "seed-1")
    assert main.main([*words, "--launcher", "ray"]) == 2
    assert capsys.readouterr().err.startswith("engram-jax: launcher = 'ray': needs Ray; pip ")
    assert main.main([*words, "--launcher", "ray", "--distributed"]) == 2
    assert "leave --distributed out" in capsys.readouterr().err
    assert main.main([*words, "--resources", "CPU=1"]) == 2
    assert "is for launcher = 'ray' only" in capsys.readouterr().err


# --- Killed anywhere ---


@pytest.mark.slow
def test_a_sweep_that_is_killed_anywhere_gives_the_same_results(
    two_runs, alone, tmp_path, compilations
):
    program = (
        "import sys, json; from etils import epath; from engram_jax.sweeps import launchers; "
        "from engram_jax.settings import from_dict; "
        "launchers.local([from_dict(run) for run in json.load(open(sys.argv[1]))], "
        "epath.Path(sys.argv[2]), print)")
    (tmp_path / "runs").write_text(json.dumps([to_dict(run) for run in two_runs]))
    place = tmp_path / "sweep"
    command = [sys.executable, "-c", program, str(tmp_path / "runs"), str(place)]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compilations),
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "PYTHONPATH": str(pathlib.Path.cwd())}
    chosen = random.Random(0)
    for run, step in ((two_runs[0], 2), (two_runs[0], 4), (two_runs[1], 4)):
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
            while not (place / run.name / "checkpoints" / str(step)).exists():
                assert process.poll() is None, "ended before it could be killed"
                time.sleep(0.002)
            time.sleep(chosen.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        assert not (place / run.name / "result.json").exists()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    assert "seed-0: done before" in done.stdout
    assert "seed-1: going on from step" in done.stdout
    assert losses([RunDirectory(place / run.name).result() for run in two_runs]) == losses(alone)
    assert logged(place, two_runs) == logged(alone.place, two_runs)
