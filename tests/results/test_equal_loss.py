"""Checkpoints of equal validation loss, and the scores that stand beside them."""

import json
import shutil

import pytest

from engram_jax.cli.main import main
from engram_jax.costs.accounting import account
from engram_jax.errors import UserError
from engram_jax.results.equal_loss import at_equal_loss, evaluated_checkpoints
from engram_jax.results.scores import Score, at_step, keep_scores, scores_of
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import changed, to_dict

LOSSES = {"experts": {6: 4.10, 7: 4.00}, "engram": {6: 3.995, 7: 3.90}}


def copied(trained, folder, name, losses, **fields):
    """A run with two checkpoints, steps 6 and 7, of the given losses."""
    shutil.copytree(trained, folder / name)
    records = RunDirectory(folder / name)
    run = changed(records.config(), {"name": name, **fields})
    (folder / name / "config.json").write_text(json.dumps(to_dict(run)))
    rows = [row for row in records.metrics() if "evaluation/loss" not in row]
    rows += [{"step": step, "evaluation/loss": loss} for step, loss in losses.items()]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return records


def score(task, value, step=7, **settings):
    return Score(of="ruler", task=task, metric="", step=step, value=value, settings=settings)


@pytest.fixture
def runs(trained, tmp_path):
    copied(trained, tmp_path, "experts", LOSSES["experts"], **{"model.engram": None})
    copied(trained, tmp_path, "engram", LOSSES["engram"])
    return tmp_path


def test_each_runs_own_checkpoint_of_the_loss_that_all_reach(runs, capsys):
    keep_scores(RunDirectory(runs / "experts"), [score("vt", 77.0), score("vt", 1.0, step=6)])
    keep_scores(RunDirectory(runs / "engram"), [score("vt", 87.0, step=6), score("vt", 89.0)])
    choices = {one.run.config.name: one for one in at_equal_loss([runs])}
    assert {name: (one.step, one.loss) for name, one in choices.items()} == {
        "experts": (7, 4.00), "engram": (6, 3.995)}
    assert {name: dict(one.scores) for name, one in choices.items()} == {
        "experts": {"vt": 77.0}, "engram": {"vt": 87.0}}
    run = RunDirectory(runs / "engram").config()
    assert choices["engram"].flops == 6 * 4 * 16 * account(run).flops_per_token
    assert main(["compare", str(runs), "--equal-loss"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("FLOPs", "4.0000", "3.9950", "77", "87"))
    assert "89" not in said


def test_a_loss_that_nobody_has_is_said_and_not_interpolated(runs, capsys):
    assert main(["compare", str(runs), "--equal-loss", "3.95", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in made["runs"]] == [None, None]
    assert {one["name"]: one["nearest"]["step"] for one in made["runs"]} == {
        "experts": 7, "engram": 6}
    assert main(["compare", str(runs), "--equal-loss", "3.9", "--tolerance", "0.02"]) == 0
    said = capsys.readouterr().out
    assert ("experts: no checkpoint within 0.02 nats of 3.9000; the nearest is of step 7, loss "
            "4.0000") in said
    assert "3.9000  3.9000" in said


def test_runs_that_began_from_a_checkpoint_tell_their_scores_with_it(trained, runs):
    for step, value in ((6, 97.0), (7, 99.0)):
        longer = copied(trained, runs, f"long-{step}", {7: 3.0}, **{"data.sequence_length": 64})
        env = longer.env()
        env["starts"] = [{"step": 0, "start_from": {"run": str(runs / "engram"), "step": step}}]
        (longer.path / "env.json").write_text(json.dumps(env))
        keep_scores(longer, [score("niah", value, length=64)])
    choices = {one.run.config.name: one for one in at_equal_loss([runs])}
    assert set(choices) == {"experts", "engram"}
    assert dict(choices["engram"].scores) == {"niah at 64 (extended to 64)": 97.0}


def test_a_checkpoint_counts_where_it_is_whole_and_was_evaluated(trained, runs):
    records = RunDirectory(runs / "engram")
    assert evaluated_checkpoints(records) == LOSSES["engram"]
    (records.checkpoints / "6" / "commit_success.txt").unlink()
    assert evaluated_checkpoints(records) == {7: 3.90}
    shutil.rmtree(records.checkpoints)
    assert evaluated_checkpoints(records) == {}
    assert not records.checkpoints.exists()
    with pytest.raises(UserError, match="has no checkpoint whose validation loss is known"):
        at_equal_loss([runs])


def test_losses_of_different_texts_are_not_compared(trained, runs, capsys):
    copied(trained, runs, "other", {7: 4.0}, **{"data.sequence_length": 8})
    assert main(["compare", str(runs), "--equal-loss"]) == 2
    assert "so their losses are of different texts" in capsys.readouterr().err
    for words, line in ((["--tolerance", "-1"], "tolerance = -1.0: must not be negative"),
                        (["--baseline", "engram"], "baseline = 'engram': is not of a comparison")):
        assert main(["compare", str(runs / "engram"), "--equal-loss", *words]) == 2
        assert line in capsys.readouterr().err


def test_scores_are_kept_and_the_later_of_two_counts(trained, tmp_path):
    records = RunDirectory(tmp_path)
    assert scores_of(records) == []
    keep_scores(records, [score("vt", 1.0, length=2048), score("cwe", float("nan"))])
    keep_scores(records, [score("vt", 2.0, length=2048), score("vt", 3.0, length=4096)])
    assert [one.value for one in scores_of(records)] == [2.0, 3.0]
    assert at_step(scores_of(records), 7) == {"vt at 2,048": 2.0, "vt at 4,096": 3.0}
    for text in ("{}", '{"scores": [{}]}', '{"scores": [{"of": "a", "task": "b", "metric": "", '
                 '"step": "7", "value": 1, "settings": {}}]}', "[", '{"scores": 3}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(UserError, match="scores"):
            scores_of(records)
