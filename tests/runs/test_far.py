"""Stops, locks, damage and beginnings of runs in object storage: as on a disk."""

import itertools
import json
import os
import signal
import threading
import time

import pytest
from etils import epath
from fsspec.spec import AbstractFileSystem
from micro import STEPS, curve, outcome, with_training

from engram_jax.cli.main import main
from engram_jax.errors import MachineError, Stopped, UserError
from engram_jax.runs import digests, lock, train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.lock import Lock
from engram_jax.runs.metrics import Metrics
from engram_jax.storage import read_json

pytestmark = [
    pytest.mark.usefixtures("compilations"),
    # Readers that orbax leaves behind find their event loop closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

NUMBERS = itertools.count()


def silent(line):
    del line


@pytest.fixture
def bucket(store):
    yield f"gs://bucket-{next(NUMBERS)}"
    store.refuse = lambda method, name: False


@pytest.fixture(scope="module")
def run(trained):
    return RunDirectory(trained).config()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Locks settle at once, and processes elsewhere are taken for dead after 1.5 seconds."""
    for name, seconds in (("STALE_S", 1.5), ("LOOK_S", 0.05), ("SETTLE_S", 0.05),
                          ("REMOTE_BEAT_S", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def stopped(trained, store, bucket):
    """The trained run in a bucket as it was before its end; its checkpoints are 6 and 7."""
    for path in sorted(trained.rglob("*")):
        name = path.relative_to(trained).as_posix()
        if path.is_file() and name != "result.json":
            name = name.replace("metrics.jsonl", "metrics-00000.jsonl")
            (epath.Path(bucket) / "run" / name).write_bytes(path.read_bytes())
    return f"{bucket}/run"


def assert_same(directory, trained):
    assert curve(directory) == curve(trained)
    assert outcome(directory) == outcome(trained)


def largest(store, prefix):
    """The name of the largest object below gs://prefix."""
    below = prefix.removeprefix("gs://")
    return max((name for name in store.objects if name.startswith(f"{below}/")),
               key=lambda name: len(store.objects[name]))


# --- Stops ---


@pytest.mark.parametrize(("owner", "name", "when", "kept"), [
    (train.placement, "put", 3, 3),
    *(pytest.param(*moment, marks=pytest.mark.slow)
      for moment in ((Metrics, "log", 2, 3), (Checkpoints, "save", 1, 3)))])
def test_sigterm_leaves_a_checkpoint_and_all_rows(
    run, trained, bucket, monkeypatch, owner, name, when, kept
):
    calls, before = [], getattr(owner, name)

    def signalled(*words, **named):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*words, **named)

    out = f"{bucket}/{name}"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Stopped, match=f"goes on from step {kept}"):
            train.train(with_training(run, checkpoint_every=3), out, silent)
    assert [row["step"] for row in curve(out)] == list(range(1, kept + 1))
    assert not epath.Path(f"{out}/lock").exists()
    train.train(run, out, silent)
    assert_same(out, trained)


@pytest.mark.slow
def test_a_store_that_takes_no_more_costs_no_more_than_the_last_checkpoint(
    run, trained, store, bucket, capsys, monkeypatch
):
    monkeypatch.setattr("engram_jax.cli.runs.named_run", lambda options: run)
    store.refuse = lambda method, name: method == "POST" and "/run/checkpoints/6" in name
    assert main(["train", "any", "--out", f"{bucket}/run"]) == 1
    assert "the checkpoint of step 6 could not be written" in capsys.readouterr().err
    store.refuse = lambda method, name: False
    said = []
    train.train(run, f"{bucket}/run", said.append)
    assert "micro: going on from step 3" in said
    assert_same(f"{bucket}/run", trained)


# --- Damage ---


def change(store, folder):
    name = largest(store, folder)
    data = bytearray(store.objects[name])
    data[len(data) // 2] ^= 1
    store.objects[name] = bytes(data)
    return name


def cut(store, folder):
    name = largest(store, folder)
    store.objects[name] = store.objects[name][:100]
    return name


def remove(store, folder):
    name = largest(store, folder)
    del store.objects[name]
    return name


@pytest.mark.parametrize("spoil", [
    change, *(pytest.param(spoil, marks=pytest.mark.slow) for spoil in (cut, remove))])
def test_a_damaged_checkpoint_is_gone_back_behind(run, trained, store, stopped, spoil, capsys):
    name = spoil(store, f"{stopped}/checkpoints/7")
    assert main(["verify", stopped]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("damaged: ") and name.split("/")[-1] in line for line in lines)
    assert f"{stopped}/checkpoints/6: whole" in lines
    said = []
    train.train(run, stopped, said.append)
    assert any(line.startswith("damaged: ") and name.split("/")[-1] in line for line in said)
    assert "micro: going on from step 6" in said
    assert_same(stopped, trained)
    aside = epath.Path(stopped) / "damaged" / "7"
    assert digests.damage(aside) != []
    assert (aside / "commit_success.txt").exists()
    assert sorted(path.name for path in RunDirectory(stopped).checkpoints.iterdir()) == ["6", "7"]
    assert main(["verify", stopped]) == 0


def test_the_only_checkpoint_stays_where_it_is(run, store, stopped):
    (epath.Path(stopped) / "checkpoints" / "6").rmtree()
    change(store, f"{stopped}/checkpoints/7")
    before = dict(store.objects)
    with pytest.raises(MachineError, match="no earlier checkpoint is left: put it back"):
        train.train(run, stopped, silent)
    below = f"{stopped.removeprefix('gs://')}/checkpoints/"
    assert {name: data for name, data in store.objects.items() if name.startswith(below)} == {
        name: data for name, data in before.items() if name.startswith(below)}


# --- From another run ---


@pytest.mark.slow
def test_a_run_begins_from_one_in_a_bucket(run, trained, store, stopped, bucket, tmp_path):
    mine = [with_training(run, steps=STEPS + 2, start_optimizer=True, start_from=f"{place}@6")
            for place in (stopped, trained)]
    train.train(mine[0], f"{bucket}/far", silent)
    train.train(mine[1], tmp_path / "near", silent)
    assert_same(f"{bucket}/far", tmp_path / "near")
    [start] = RunDirectory(f"{bucket}/far").env()["starts"]
    assert start["start_from"] == {**start["start_from"], "run": stopped, "step": 6}
    change(store, f"{stopped}/checkpoints/7")
    with pytest.raises(MachineError, match=r"training.start_from = .*is not what was written"):
        train.train(with_training(run, start_from=stopped), f"{bucket}/from damage", silent)
    with pytest.raises(UserError, match="no checkpoint of step 5; there are 6, 7"):
        train.train(with_training(run, start_from=f"{stopped}@5"), f"{bucket}/none", silent)


# --- One process at a time ---


def held(bucket, **changes):
    """The lock of a process that was killed, with some of its fields changed."""
    with Lock(epath.Path(bucket)):
        holder = json.loads((epath.Path(bucket) / "lock").read_text())
    (epath.Path(bucket) / "lock").write_text(json.dumps({**holder, "token": "dead", **changes}))


def test_a_second_start_is_refused(bucket, tmp_path):
    with Lock(epath.Path(bucket)):
        holder = json.loads((epath.Path(bucket) / "lock").read_text())
        line = rf"out = '{bucket}': process {os.getpid()} on .* trains there now"
        with pytest.raises(UserError, match=line), Lock(epath.Path(bucket)):
            pass
        # Taken for a process of another machine, it is heard beating.
        (epath.Path(bucket) / "lock").write_text(json.dumps({**holder, "machine": "another"}))
        with pytest.raises(UserError, match=line), Lock(epath.Path(bucket)):
            pass
    assert not (epath.Path(bucket) / "lock").exists()


@pytest.mark.parametrize("changes", [
    {"pid": 2**22 + 1}, {"started": "1"}, {"machine": "another", "pid": 1}])
def test_a_lock_of_a_dead_process_is_taken_away(bucket, changes):
    held(bucket, **changes)
    with Lock(epath.Path(bucket)) as mine:
        mine.check()
    assert not (epath.Path(bucket) / "lock").exists()


@pytest.mark.parametrize("wait", [5.0, 0.1])
def test_a_beat_under_way_does_not_bring_a_lock_back(bucket, monkeypatch, wait):
    """A store that answers slowly may keep a beat for longer than `release` waits."""
    monkeypatch.setattr(lock, "BEAT_S", wait)
    begun, text = threading.Event(), Lock._text

    def slow(self, beats):
        if beats:
            begun.set()
            time.sleep(0.3)
        return text(self, beats)

    monkeypatch.setattr(Lock, "_text", slow)
    before = set(threading.enumerate())
    with Lock(epath.Path(bucket)):
        beats = set(threading.enumerate()) - before
        assert begun.wait(30)
    for thread in beats:
        thread.join(30)
    assert not (epath.Path(bucket) / "lock").exists()


def test_a_holder_that_ends_while_waited_for_lets_others_in(bucket, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 30)
    held(bucket, machine="another")
    threading.Timer(0.3, (epath.Path(bucket) / "lock").unlink).start()
    with Lock(epath.Path(bucket)) as mine:
        mine.check()


def test_a_lock_that_a_third_process_made_is_not_taken_away(bucket, monkeypatch):
    held(bucket, machine="another")
    moves = Lock._moves

    def then(self, holder):
        found = moves(self, holder)
        held(bucket, token="of a third", machine="a third")
        return found

    late = Lock(epath.Path(bucket))
    dead = late._read()
    (epath.Path(bucket) / "lock").unlink()
    monkeypatch.setattr(Lock, "_moves", then)
    late._pass_over(dead)
    assert "of a third" in (epath.Path(bucket) / "lock").read_text()


def test_a_lock_is_whole_to_who_reads_it_during_a_beat(bucket, monkeypatch):
    monkeypatch.setattr(lock, "REMOTE_BEAT_S", 0.0005)
    path, texts = epath.Path(bucket) / "lock", set()
    with Lock(epath.Path(bucket)) as mine:
        while len(texts) < 120:  # a count without leading zeros would grow twice
            texts.add(path.read_text())
        mine.check()
    assert all(json.loads(text)["pid"] == os.getpid() for text in texts)


def test_a_lock_read_in_part_is_read_again(bucket, monkeypatch):
    with Lock(epath.Path(bucket)) as mine:
        read, cuts = mine._read, [10, 50]
        monkeypatch.setattr(mine, "_read", lambda: read()[:cuts.pop()] if cuts else read())
        mine.check()
        assert not cuts


def test_of_two_starts_at_once_one_goes_on(bucket, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_S", 0.5)
    answers, start = [], threading.Barrier(2)

    def enter():
        start.wait()
        try:
            with Lock(epath.Path(bucket)):
                answers.append("in")
                release.wait(30)
        except UserError as error:
            answers.append(str(error))

    release = threading.Event()
    threads = [threading.Thread(target=enter) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(answers) < 2 and all(thread.is_alive() for thread in threads):
        threads[0].join(0.05)
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(answer if answer == "in" else "refused" for answer in answers) == [
        "in", "refused"]


def test_who_was_taken_for_dead_writes_no_more(run, store, bucket, monkeypatch):
    monkeypatch.setattr(lock, "REMOTE_BEAT_S", 600)  # a beat under way would take the lock back
    put, calls = train.placement.put, []

    def taken(*words):
        calls.append(1)
        if len(calls) == 2:
            (epath.Path(bucket) / "run" / "lock").write_text(json.dumps({"token": "another"}))
        return put(*words)

    monkeypatch.setattr(train.placement, "put", taken)
    with pytest.raises(MachineError, match="another process trains here now"):
        train.train(run, f"{bucket}/run", silent)
    assert "another" in (epath.Path(bucket) / "run" / "lock").read_text()
    assert not any("/checkpoints/" in name for name in store.objects
                   if name.startswith(f"{bucket.removeprefix('gs://')}/"))


# --- Who reads what a run is writing ---


@pytest.mark.parametrize("reading", range(1, 5))
def test_json_that_grows_while_it_is_read_is_read_again(store, bucket, reading):
    path = epath.Path(bucket) / "env.json"
    path.write_text('{"starts": [1]}')
    name, asked = f"{bucket}/env.json".removeprefix("gs://"), []

    def grow(method, key):
        if (method, key) == ("GET", name):
            asked.append(key)
            if len(asked) == reading:
                store.objects[name] = b'{"starts": [1, 2]}'
                store.versions[name] += 1
        return False

    store.refuse = grow
    assert read_json(path)["starts"] in ([1], [1, 2])
    assert len(asked) >= 2


def test_rows_whose_part_is_removed_while_they_are_read_are_read_again(bucket, monkeypatch):
    for number in range(2):
        (epath.Path(bucket) / f"metrics-{number:05d}.jsonl").write_text(
            f'{{"step": {number + 1}}}\n')
    places = Metrics._places

    def gone(self):
        found = places(self)
        found[-1].unlink()
        monkeypatch.setattr(Metrics, "_places", places)
        return found

    monkeypatch.setattr(Metrics, "_places", gone)
    assert Metrics(epath.Path(bucket)).rows() == [{"step": 1}]


@pytest.mark.parametrize("kind", ["gs", "gcs", "s3"])
def test_no_library_keeps_lists_of_what_others_write(kind):
    """gcsfs and s3fs do unless they are told not to, and answer from them for good."""
    kept = type("Kept", (AbstractFileSystem,), {"protocol": kind, "cachable": False})
    assert not kept().dircache.use_listings_cache
