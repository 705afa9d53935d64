"""What a run does when something goes wrong that is nobody's bug."""

import contextlib
import errno
import json
import os
import shutil
import threading
import time

import pytest
from etils import epath
from micro import STEPS, curve, with_data, with_optimizer, with_training
from tokenizers import Tokenizer

from engram_jax.cli.main import main
from engram_jax.config import TrainingConfig
from engram_jax.errors import MachineError, UserError
from engram_jax.results import comparing, scores
from engram_jax.runs import digests, lock, train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.divergence import Diverged
from engram_jax.runs.lock import Lock
from engram_jax.runs.metrics import Metrics
from engram_jax.runs.reader import whole_digest
from engram_jax.settings import json_text

pytestmark = pytest.mark.usefixtures("compilations")


def silent(line):
    del line


@pytest.fixture(scope="module")
def run(trained):
    return RunDirectory(trained).config()


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def stopped(copied):
    """A run that was stopped after its checkpoint of step 6, of 7."""
    (copied / "result.json").unlink()
    shutil.rmtree(copied / "checkpoints" / "7")
    return copied


def loss(directory):
    return RunDirectory(directory).result()["loss"]


# --- A run is saved before it is evaluated ---


def refuses(*words):
    raise MachineError("out of memory")


def test_an_evaluation_that_fails_costs_no_step(run, trained, tmp_path, monkeypatch):
    once = with_training(run, checkpoint_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluator", lambda *words: refuses)
        with pytest.raises(MachineError, match="out of memory"):
            train.train(once, tmp_path, silent)
    said = []
    train.train(once, tmp_path, said.append)
    assert f"micro: going on from step {STEPS}" in said
    assert curve(tmp_path) == curve(trained)
    assert loss(tmp_path) == loss(trained)


@pytest.mark.slow
def test_an_evaluation_on_the_way_that_fails_is_made_up_for(run, tmp_path, monkeypatch):
    often = with_training(run, checkpoint_every=2, evaluate_every=4)
    train.train(often, tmp_path / "whole", silent)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluator", lambda *words: refuses)
        with pytest.raises(MachineError, match="out of memory"):
            train.train(often, tmp_path / "run", silent)
    said = []
    train.train(often, tmp_path / "run", said.append)
    assert "micro: going on from step 4" in said
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


# --- The tokenizer of a run is the whole of it ---


def without_merges(text):
    values = json.loads(text)
    values["model"]["merges"] = []
    return json.dumps(values)


def test_a_run_does_not_go_on_with_other_merges(run, stopped, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text((stopped / "tokenizer.json").read_text())
    mine = with_data(run, tokenizer=str(other))
    (stopped / "config.json").write_text(json_text(train.to_dict(mine)))
    other.write_text(without_merges(other.read_text()))
    with pytest.raises(UserError, match=r"data.tokenizer = .* is no longer the tokenizer that"):
        train.train(mine, stopped, silent)
    assert (stopped / "tokenizer.json").read_text() != other.read_text()


def test_a_checkpoint_is_not_opened_with_other_merges(stopped, capsys):
    tokenizer = stopped / "tokenizer.json"
    tokenizer.write_text(without_merges(tokenizer.read_text()))
    assert main(["evaluate", str(stopped)]) == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err


def test_the_digest_of_a_tokenizer_is_of_all_that_it_does(trained):
    text = (trained / "tokenizer.json").read_text()
    values = json.loads(text)
    digests = [whole_digest(Tokenizer.from_str(text))]
    for change in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}},
                   {"added_tokens": [{**values["added_tokens"][0], "lstrip": True},
                                     *values["added_tokens"][1:]]}):
        digests.append(whole_digest(Tokenizer.from_str(json.dumps({**values, **change}))))
    digests.append(whole_digest(Tokenizer.from_str(without_merges(text))))
    assert len(set(digests)) == len(digests)
    assert whole_digest(Tokenizer.from_str(json.dumps(values, indent=3))) == digests[0]


def test_every_start_is_recorded(run, stopped, monkeypatch):
    first = RunDirectory(stopped).env()
    monkeypatch.setattr("sys.argv", ["another", "command"])
    train.train(run, stopped, silent)
    env = RunDirectory(stopped).env()
    assert {**env, "starts": None} == {**first, "starts": None}
    assert [start["step"] for start in env["starts"]] == [0, 6]
    assert env["starts"][1]["command"] == ["another", "command"]
    assert all(start["time"].endswith("+00:00") for start in env["starts"])


# --- A run that diverges ---


def diverging(run, **training):
    return with_training(with_optimizer(run, learning_rate=1e30), **training)


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_a_run_that_diverges_stops_and_says_so(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engram_jax.cli.runs.named_run", lambda options: diverging(run))
    assert main(["train", "any", "--out", str(tmp_path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("engram-jax: diverged at step 2: learning/")
    assert "training.skips_in_a_row" in line
    assert not (tmp_path / "result.json").exists()
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert "not_finite" not in rows[0]
    assert "learning/grad_norm" in rows[-1]["not_finite"]


def test_no_checkpoint_of_a_bad_state_takes_the_place_of_a_good_one(run, tmp_path):
    bad = diverging(run, checkpoint_every=1, keep_checkpoints=1, skips_in_a_row=5)
    with pytest.raises(Diverged):
        train.train(bad, tmp_path, silent)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_run_that_ends_before_it_may_be_given_up_is_no_result(run, tmp_path):
    with pytest.raises(Diverged, match=f"diverged at step {STEPS}: the evaluation's loss is"):
        train.train(diverging(run, skips_in_a_row=STEPS), tmp_path, silent)
    assert not (tmp_path / "result.json").exists()


def test_no_file_that_calls_itself_json_holds_a_nan(tmp_path):
    assert strict(json_text({"a": [float("nan"), (1.5, float("inf"))], "b": "NaN"})) == {
        "a": [None, [1.5, None]], "b": "NaN"}
    log = Metrics(epath.Path(tmp_path))
    log.log({"step": 1, "loss": float("nan"), "rate": 0.5})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "rate": 0.5, "not_finite": ["loss"]}


def test_a_result_of_a_run_that_diverged_is_refused_by_name(copied):
    path = copied / "result.json"
    path.write_text(path.read_text().replace(f"{loss(copied)}", "NaN"))
    with pytest.raises(UserError, match=r"result.json: is not JSON .*NaN is no number"):
        comparing.arms([str(copied)])


# --- Crashes ---


@pytest.mark.parametrize("fields", [{"seed": 3_000_000_000}, {"steps": 2**31}])
def test_numbers_that_no_run_can_hold(fields):
    [(name, value)] = fields.items()
    with pytest.raises(UserError, match=rf"training.{name} = {value}: must be at most 2147483647"):
        TrainingConfig(**{"steps": 1, **fields})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0\0\0\0", '{"loss": NaN}', '{"loss": "x"}',
                                  "[" * 100_000])
@pytest.mark.parametrize("name", ["result.json", "config.json", "env.json"])
def test_a_damaged_record_is_one_line(run, copied, name, text, capsys, monkeypatch):
    if name == "env.json":
        (copied / "result.json").unlink()
        if text.startswith('{"'):
            pytest.skip("is an env.json of another run")
    (copied / name).write_text(text)
    monkeypatch.setattr("engram_jax.cli.runs.named_run", lambda options: run)
    assert main(["train", "any", "--out", str(copied)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    if not (name == "config.json" and text.startswith('{"')):
        assert f"{copied / name}" in line


def test_a_damaged_row_of_metrics_is_one_line(run, stopped, capsys, monkeypatch):
    path = stopped / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:20]
    path.write_text("\n".join(lines))
    monkeypatch.setattr("engram_jax.cli.runs.named_run", lambda options: run)
    assert main(["train", "any", "--out", str(stopped)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{path}: line 3 is damaged" in line


# --- Two starts in one folder ---


def test_of_two_starts_at_once_one_is_refused(run, tmp_path, monkeypatch):
    inside, leave = threading.Event(), threading.Event()
    save = Checkpoints.save

    def waiting(self, *words):
        inside.set()
        assert leave.wait(60)
        save(self, *words)

    monkeypatch.setattr(Checkpoints, "save", waiting)
    first = threading.Thread(target=train.train, args=(run, tmp_path, silent))
    first.start()
    assert inside.wait(60)
    try:
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* trains there now"):
            train.train(run, tmp_path, silent)
    finally:
        leave.set()
        first.join()
    assert [row["step"] for row in curve(tmp_path) if "learning/loss" in row] == [
        *range(1, STEPS + 1)]
    assert not (tmp_path / "lock").exists()


def left_by(folder, **changes):
    """The lock of a process that was killed, with some of its fields changed."""
    with Lock(epath.Path(folder)):
        holder = json.loads((folder / "lock").read_text())
    (folder / "lock").write_text(json.dumps({**holder, "token": "dead", **changes}))


@pytest.fixture
def quick(monkeypatch):
    """Processes elsewhere are taken for dead after 1.5 seconds."""
    for name, seconds in (("STALE_S", 1.5), ("LOOK_S", 0.05), ("BEAT_S", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.mark.parametrize("changes", [
    {"pid": 2**22 + 1},  # gone
    {"started": "1"},  # its number is another process's now
    {"machine": "another", "pid": 1},
    {"machine": None, "pid": "x"},
])
def test_a_lock_of_a_dead_process_is_taken_away(tmp_path, quick, changes):
    left_by(tmp_path, **changes)
    with Lock(epath.Path(tmp_path)) as mine:
        mine.check()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_lock_is_one_of_a_dead_process(tmp_path, quick, text):
    (tmp_path / "lock").write_text(text)
    with Lock(epath.Path(tmp_path)):
        pass


def test_a_process_elsewhere_that_gives_a_sign_is_left_alone(tmp_path, quick):
    left_by(tmp_path, machine="another", host="elsewhere")
    over = threading.Event()

    def touch():
        while not over.wait(0.1):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=touch)
    thread.start()
    said = []
    try:
        with (pytest.raises(UserError, match="on elsewhere trains there now"),
              Lock(epath.Path(tmp_path), said.append)):
            pass
    finally:
        over.set()
        thread.join()
    assert "waiting up to 1.5 s" in said[0]
    assert "dead" in (tmp_path / "lock").read_text()


def test_a_holder_gives_signs(tmp_path, quick):
    with Lock(epath.Path(tmp_path)):
        holder = json.loads((tmp_path / "lock").read_text())
        (tmp_path / "lock").write_text(json.dumps({**holder, "machine": "another"}))
        with pytest.raises(UserError, match="trains there now"), Lock(epath.Path(tmp_path)):
            pass


def test_who_was_taken_for_dead_writes_no_more(tmp_path):
    with Lock(epath.Path(tmp_path)) as mine:
        mine.check()
        left_by_another = json.dumps({"token": "another"})
        (tmp_path / "lock").write_text(left_by_another)
        with pytest.raises(MachineError, match="another process trains here now"):
            mine.check()
    assert (tmp_path / "lock").read_text() == left_by_another


def test_the_last_look_comes_after_the_wait(tmp_path, quick):
    """Whatever holds this process up meanwhile, such as a terminal that takes no more lines."""
    with Lock(epath.Path(tmp_path)):
        holder = json.loads((tmp_path / "lock").read_text())
        (tmp_path / "lock").write_text(json.dumps({**holder, "machine": "another"}))
        with (pytest.raises(UserError, match="trains there now"),
              Lock(epath.Path(tmp_path), lambda line: time.sleep(2))):
            pass


def test_a_lock_that_cannot_be_read_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("somebody's")

    def denied(self):
        raise PermissionError("no")

    monkeypatch.setattr(Lock, "_read", denied)
    with pytest.raises(MachineError, match="could not be written"), Lock(epath.Path(tmp_path)):
        pass
    assert (tmp_path / "lock").read_text() == "somebody's"


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch):
    """NFS asks again then, and hears that the name is taken."""
    link = os.link

    def twice(*names):
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", twice)
    with Lock(epath.Path(tmp_path)) as mine:
        mine.check()


def test_a_process_that_the_system_hides_is_heard_beating(tmp_path, quick, monkeypatch):
    """/proc may be mounted such that nobody sees the processes of others (hidepid)."""
    def denied(*words):
        raise PermissionError(*words)

    with Lock(epath.Path(tmp_path)):
        other = Lock(epath.Path(tmp_path))
        read = lock.Path.read_text
        monkeypatch.setattr(lock.Path, "read_text", lambda path, *words: denied(path) if str(
            path) == f"/proc/{os.getpid()}/stat" else read(path, *words))
        monkeypatch.setattr(os, "kill", denied)
        with pytest.raises(UserError, match="trains there now"), other:
            pass


def test_a_full_disk_leaves_no_empty_lock(tmp_path, monkeypatch):
    def full(*words, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    made = open

    def opened(path, mode="r"):
        file = made(path, mode)
        file.write = full
        return file

    monkeypatch.setattr(lock, "open", opened, raising=False)
    with pytest.raises(MachineError, match="No space left"), Lock(epath.Path(tmp_path)):
        pass
    assert os.listdir(tmp_path) == []


# --- Who reads what a run is writing ---


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_damaged(copied, monkeypatch, capsys):
    digest, removed = digests._digest, []

    def gone(path):
        found = digest(path)
        folder = next(parent for parent in path.parents if parent.parent.name == "checkpoints")
        if not removed:
            removed.append(folder.name)
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(digests, "_digest", gone)
    assert main(["verify", str(copied)]) == 0
    assert f"checkpoints/{removed[0]}" not in capsys.readouterr().out


def test_scores_of_two_evaluations_that_end_together_are_both_kept(copied, monkeypatch):
    together, read = threading.Barrier(2), scores.scores_of

    def slow(records):
        found = read(records)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.3)  # both have read, if nothing keeps them apart
        return found

    monkeypatch.setattr(scores, "scores_of", slow)
    records = RunDirectory(copied)
    both = [threading.Thread(target=scores.keep_scores, args=(records, [
        scores.Score(of="harness", task=task, metric="acc", step=7, value=1.0)]))
        for task in ("a", "b")]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert {score.task for score in read(records)} == {"a", "b"}
