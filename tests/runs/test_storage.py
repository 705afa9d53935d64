"""Runs, checkpoints and token shards in object storage: a store in memory, reached over HTTP."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from micro import micro, plain, with_data, write_text

from engram_jax import storage
from engram_jax.cli import main
from engram_jax.data.tokens import open_tokens
from engram_jax.errors import MachineError, UserError
from engram_jax.runs import metrics, train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.metrics import Metrics
from engram_jax.runs.reader import open_inputs
from engram_jax.settings import to_dict
from engram_jax.sweeps import sweep
from engram_jax.training.placement import placed_state, single_mesh

pytestmark = pytest.mark.usefixtures("compilations")


def silent(line):
    del line


@pytest.fixture
def bucket(store, request):
    yield "gs://" + request.node.name.replace("_", "-").split("[")[0][:60]
    store.refuse = lambda method, name: False


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return plain(micro(text, evaluate_every=5))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The records of the run, trained on a disk in one go."""
    place = tmp_path_factory.mktemp("whole") / "run"
    train.train(run, place, silent)
    return RunDirectory(place)


def curve(records):
    return [{name: value for name, value in row.items() if not name.startswith("perf/")}
            for row in records.metrics()]


def outcome(records):
    return {name: value for name, value in records.result().items() if name != "tokens_per_s"}


def arrays(run, records):
    inputs = open_inputs(run)
    with Checkpoints(records.checkpoints, 2, inputs.fingerprints()) as checkpoints:
        state = checkpoints.restore(placed_state(run, single_mesh()))
    return {jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_run(run, records, whole):
    assert curve(records) == curve(whole)
    assert outcome(records) == outcome(whole)
    ours, theirs = arrays(run, records), arrays(run, whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# Runs


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_stopped_goes_on(
    run, whole, store, bucket, monkeypatch, capsys
):
    far = with_data(run, cache_dir=f"{bucket}/cache")
    save = Checkpoints.save

    def stopping(self, at, state, batches):
        save(self, at, state, batches)
        self.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.train(far, f"{bucket}/run", silent)
    said = []
    train.train(far, f"{bucket}/run", said.append)
    assert any("going on from step 3" in line for line in said)
    records = RunDirectory(f"{bucket}/run")
    assert_same_run(far, records, whole)
    assert not [name for name in store.objects if name.endswith(".part")]
    assert sorted(path.name for path in records.checkpoints.iterdir()) == ["6", "7"]
    assert main.main(["evaluate", f"{bucket}/run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == records.result()["loss"]
    assert main.main(["generate", f"{bucket}/run", "--prompt", "ka", "--tokens", "2"]) == 0


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_goes_on(
    run, whole, store, bucket, tmp_path, compilations
):
    far = with_data(run, cache_dir=f"{bucket}/cache")
    (tmp_path / "config").write_text(json.dumps(to_dict(far)))
    program = (
        "import sys, json, object_store; object_store.use(); "
        "from engram_jax.settings import from_dict; from engram_jax.runs import train; "
        "train.train(from_dict(json.load(open(sys.argv[1]))), sys.argv[2])")
    here = pathlib.Path(__file__).parents[1]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compilations),
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
           "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, "-c", program, str(tmp_path / "config"), f"{bucket}/run"]
    name = bucket.removeprefix("gs://")
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        # Of the second checkpoint, while it is being written.
        while not any(key.startswith(f"{name}/run/checkpoints/6") for key in list(store.objects)):
            assert process.poll() is None, "ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    assert f"{name}/run/result.json" not in store.objects
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    assert_same_run(far, RunDirectory(f"{bucket}/run"), whole)


def test_writers_of_one_file_do_not_meet(tmp_path):
    path, start = epath.Path(tmp_path) / "same.json", threading.Barrier(4)

    def write(number):
        start.wait()
        for _ in range(50):
            storage.write_text(path, str(number) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert path.read_text() in [str(number) * 1000 for number in range(4)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["same.json"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(MachineError, match="could not be written"):
        storage.write_text(epath.Path(tmp_path) / "taken", "text")
    assert os.listdir(tmp_path) == ["taken"]


@pytest.fixture
def happened(monkeypatch):
    """What is flushed to the disk, and what gets its name, in order."""
    lines, flushed, moved = [], os.fsync, os.replace

    def fsync(handle):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
        lines.append(name.strip(".").split(".")[0])
        flushed(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda source, target: lines.append(
        f"name {os.path.basename(target)}") or moved(source, target))
    return lines


def test_a_record_is_on_the_disk_before_it_has_its_name(tmp_path, happened):
    storage.write_text(epath.Path(tmp_path) / "result.json", "{}")
    assert happened == ["result", "name result.json", tmp_path.name]


def test_rows_are_on_the_disk_when_they_are_flushed(tmp_path, happened):
    log = Metrics(epath.Path(tmp_path))
    log.log({"step": 1})
    assert happened == []
    for _ in range(2):
        log.flush()
    assert happened == ["metrics"]


def test_a_checkpoint_that_is_not_whole_is_not_gone_on_with(run, whole, store, bucket):
    for path in pathlib.Path(whole.path).rglob("*"):
        if path.is_file():
            target = epath.Path(bucket) / "run" / str(path.relative_to(whole.path))
            target.write_bytes(path.read_bytes())
    records = RunDirectory(f"{bucket}/run")
    (records.checkpoints / "7" / "commit_success.txt").unlink()
    with Checkpoints(records.checkpoints, 2, {}) as checkpoints:
        assert checkpoints.latest == 6
        checkpoints.discard_unfinished()
    assert [path.name for path in records.checkpoints.iterdir()] == ["6"]


def test_what_a_store_refuses_is_one_line(run, store, bucket, capsys):
    store.refuse = lambda method, name: method == "POST" and name.endswith("config.json")
    words = ["train", "tiny", "--out", f"{bucket}/run", "--set", f"data.path={run.data.path}",
             "--set", "training.steps=1"]
    assert main.main(words) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"engram-jax: {bucket}/run/config.json: could not be written (")
    assert "\n" not in line


def test_a_sweeps_report_goes_into_a_bucket(store, bucket):
    results = [
        {"name": f"run-{slots}-seed0", "memory": "Engram", "slots": slots, "loss": loss,
         "memory_params": 1, "total_params": 2, "active_params": 1, "tokens_per_s": 1.0,
         "flops_per_token": 6, "text": "text.txt", "seed": 0, "tokens": 10}
        for slots, loss in ((10, 3.0), (100, 2.5), (1000, 2.1))]
    sweep.report("memory_scaling", results, epath.Path(bucket) / "sweep", silent)
    name = bucket.removeprefix("gs://")
    table = store.objects[f"{name}/sweep/results.csv"].decode()
    assert sweep.from_csv(table) == results
    assert store.objects[f"{name}/sweep/loss_against_slots.png"].startswith(b"\x89PNG")


# Metrics


def steps(place):
    return [row["step"] for row in Metrics(epath.Path(place)).rows()]


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_metrics_survive_a_kill_and_are_cut(where, store, bucket, tmp_path, monkeypatch):
    place = epath.Path(bucket) / "run" if where == "bucket" else epath.Path(tmp_path)
    monkeypatch.setattr(metrics, "PART_CHARACTERS", 30)
    log = Metrics(place)
    for step in range(1, 11):
        log.log({"step": step})
    log.flush()
    assert steps(place) == list(range(1, 11))
    for last, count in ((10, 10), (6, 6), (0, 0)):
        again = Metrics(place)
        again.truncate(last)
        again.log({"step": 99})
        again.flush()
        assert steps(place) == [*range(1, count + 1), 99]
        Metrics(place).truncate(last)
        assert steps(place) == list(range(1, count + 1))


def test_metrics_go_out_now_and_then(store, bucket):
    log = Metrics(epath.Path(bucket))
    for step in range(5):
        log.log({"step": step})
    writes = [line for line in store.requests if line == f"POST {bucket[5:]}/metrics-00000.jsonl"]
    assert 1 <= len(writes) <= 2  # gcsfs takes two requests for a write
    assert steps(bucket) == [0]
    log.flush()
    assert steps(bucket) == [0, 1, 2, 3, 4]


# Token shards


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_token_shards_are_packed_into_a_bucket_and_copied_once(
    kind, run, store, bucket, monkeypatch, tmp_path
):
    fsspec.register_implementation("s3", MemoryFileSystem, clobber=True)
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    bucket = bucket.replace("gs://", f"{kind}://")
    near = open_tokens(run.data)
    text = epath.Path(bucket) / "text" / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_bytes(pathlib.Path(run.data.path).read_bytes())
    far = with_data(run, path=str(text), cache_dir=f"{bucket}/cache").data
    first = open_tokens(far)
    assert first.directory.startswith(f"{bucket}/cache/tokens/")
    assert first.fingerprint == near.fingerprint
    assert not (tmp_path / "downloads").exists()
    for _ in range(2):
        data = open_tokens(far)
        length = len(near.train)
        np.testing.assert_array_equal(data.train.read(0, length), near.train.read(0, length))
    [copy] = (tmp_path / "downloads").rglob("*.npy")
    reads = [line for line in store.requests if line.startswith(f"GET {bucket[5:]}/cache/")
             and line.endswith("train-00000.npy")]
    assert kind == "s3" or 1 <= len(reads) <= 3
    copy.write_bytes(copy.read_bytes()[:50])
    with pytest.raises(UserError, match="truncated"):
        open_tokens(far).train.read(0, 1)
    assert open_tokens(far).train.read(0, 1) == near.train.read(0, 1)
    (epath.Path(data.directory) / "train-00000.npy").unlink()
    with pytest.raises(UserError, match=r"train-00000\.npy: is missing"):
        open_tokens(with_data(run, path=data.directory).data)


# What is not there


@pytest.mark.parametrize(("settings", "line"), [
    (["--out", "gs://bucket/run"],
     "out = 'gs://bucket/run': needs `pip install 'engram_jax[gcs]'`"),
    (["--out", "here", "--set", "data.path=s3://bucket/text"],
     "data.path = 's3://bucket/text': needs `pip install 'engram_jax[s3]'`"),
    (["--out", "here", "--set", "data.cache_dir=gs://bucket/text"],
     "data.cache_dir = 'gs://bucket/text': needs `pip install 'engram_jax[gcs]'`"),
    (["--out", "az://bucket/run"], "out = 'az://bucket/run': must be on a disk, gs:// or s3://"),
])
def test_a_missing_library_is_one_line(settings, line, monkeypatch, tmp_path, capsys):
    def missing(kind):
        raise ImportError(kind)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    assert main.main(["train", "tiny", *settings]) == 2
    assert capsys.readouterr().err == f"engram-jax: {line}\n"


def test_a_run_cannot_be_on_s3(monkeypatch):
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda kind: object)
    with pytest.raises(UserError, match="Orbax keeps checkpoints on disks and gs:// only"):
        RunDirectory("s3://bucket/run")


def test_errors_of_the_libraries_are_the_machines():
    line = r"^gs://b/x: could not be read \(KeyError: 'token'\)$"
    with pytest.raises(MachineError, match=line), storage.refusals("gs://b/x", "read"):
        raise KeyError("token")
    with pytest.raises(KeyError), storage.refusals("/b/x", "read"):
        raise KeyError("token")
