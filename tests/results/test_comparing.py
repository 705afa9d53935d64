"""Runs side by side: arms over seeds, the fields that differ, and intervals; on written records."""

import dataclasses
import json

import pytest
from micro import STEPS, micro, plain, with_data, with_model, with_training

from engram_jax.cli import main
from engram_jax.costs.accounting import account
from engram_jax.errors import UserError
from engram_jax.recipes import without_memory
from engram_jax.results import comparing
from engram_jax.results.statistics import interval
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import to_dict

BASE = plain(micro("text.txt"))
LOSSES = {"small": (4.5, 4.75), "large": (4.25, 4.375), "bare": (5.0, 5.5)}


def seeded(run, name, seed):
    run = with_data(with_training(run, seed=seed), seed=seed)
    return dataclasses.replace(run, name=f"{name}-seed{seed}")


def larger(rows):
    engram = dataclasses.replace(BASE.model.engram, rows_per_head=(rows, rows))
    return with_model(BASE, engram=engram)


ARMS = {"small": BASE, "large": larger(1024), "bare": without_memory(BASE)}


def write(place, run, loss=None, text="abcdef0123", step=3):
    """A run directory, done if there is a loss."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(to_dict(run)))
    (place / "env.json").write_text(json.dumps({"data_fingerprint": text}))
    if loss is None:
        (place / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
    else:
        (place / "result.json").write_text(json.dumps(
            {"name": run.name, "loss": loss, "bits_per_byte": loss / 2, "tokens_per_s": 1000.0}))
    return place


@pytest.fixture
def sweep(tmp_path):
    """Three arms of two seeds, and a third seed of one arm that is not done."""
    for name, run in ARMS.items():
        for seed, loss in enumerate(LOSSES[name]):
            write(tmp_path / "sweep" / f"{name}-seed{seed}", seeded(run, name, seed), loss)
    write(tmp_path / "sweep" / "small-seed2", seeded(BASE, "small", 2))
    (tmp_path / "sweep" / "notes").mkdir()
    return tmp_path / "sweep"


def by_name(found):
    return {arm.name: arm for arm in found}


def test_seeds_of_one_config_are_an_arm(sweep):
    found = by_name(comparing.arms([sweep]))
    assert set(found) == set(ARMS)
    for name, arm in found.items():
        assert arm.values("loss") == {(seed, seed): loss for seed, loss in enumerate(LOSSES[name])}
        assert arm.mean("loss") == interval(LOSSES[name])
        assert arm.numbers.parts == account(ARMS[name]).parts
    assert [run.path.name for run in found["small"].unfinished] == ["small-seed2"]
    assert found["small"].unfinished[0].step == 3


def test_only_fields_that_differ_are_shown(sweep):
    found = comparing.arms([sweep])
    assert comparing.differing(found) == ["model.engram", "model.engram.rows_per_head"]
    assert comparing.differing(found[:1]) == []


def test_arms_are_compared_at_equal_seeds(sweep):
    found = by_name(comparing.arms([sweep]))
    assert found["large"].against(found["small"]) == interval([-0.25, -0.375])
    assert found["small"].against(found["small"]) is None


def test_losses_on_another_text_have_no_difference(tmp_path):
    places = [write(tmp_path / name, seeded(BASE, name, 0), 4.0, text)
              for name, text in (("one", "abcdefgh1"), ("two", "bcdefghi1"))]
    first, second = comparing.arms(places)
    assert second.against(first) is None
    assert comparing.differing([first, second]) == ["text"]


def test_one_run_in_two_folders_is_not_two_seeds(tmp_path):
    places = [write(tmp_path / folder, seeded(BASE, "same", 0), 4.0) for folder in ("a", "b")]
    found = comparing.arms([*places, places[0]])
    assert [arm.mean("loss").count for arm in found] == [1, 1]
    assert [arm.name for arm in found] == [str(place) for place in places]


def test_the_table(sweep, capsys):
    assert main.main(["compare", str(sweep / "small-seed0"), str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "run", "engram", "rows_per_head", "seeds", "total", "active", "memory", "loss", "(95", "%)",
        "against", "small", "(t)", "(bootstrap)", "bits/byte", "tokens/s"]
    small, bare, large = (line.split() for line in lines[2:5])
    assert small[:4] == ["small", "set", "64,128", "2"]
    assert bare[:4] == ["bare", "none", "-", "2"]
    assert large[:4] == ["large", "set", "1024,1024", "2"]
    gap = interval([-0.25, -0.375])
    assert large[7:] == [
        "4.3125", "(3.5184", "to", "5.1066)", *gap.signed().split(), "(-0.3750", "to", "-0.2500)",
        "2.1562", "1,000"]
    assert lines[5] == f"{sweep / 'small-seed2'}: step 3 of {STEPS}, not done"


def test_json(sweep, capsys):
    assert main.main(["compare", str(sweep), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fields"] == ["model.engram", "model.engram.rows_per_head"]
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert arms["bare"]["fields"] == {"model.engram": None, "model.engram.rows_per_head": None}
    assert found["baseline"] == "bare"
    assert arms["bare"]["loss_against_baseline"] is None
    gap = arms["large"]["loss_against_baseline"]
    assert gap == dataclasses.asdict(interval([-0.75, -1.125]))
    resampled = arms["large"]["loss_against_baseline_bootstrap"]
    assert resampled == {"mean": gap["mean"], "low": -1.125, "high": -0.75, "count": 2}
    assert arms["large"]["loss"] == dataclasses.asdict(interval(LOSSES["large"]))
    assert arms["large"]["memory_params"] == account(ARMS["large"]).engram_params
    assert arms["small"]["unfinished"] == [
        {"run": str(sweep / "small-seed2"), "step": 3, "steps": STEPS}]


def test_the_baseline_is_named_at_the_command_line(sweep, capsys):
    assert main.main(["compare", str(sweep), "--json", "--baseline", "large"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    arms = {arm["name"]: arm for arm in comparison["arms"]}
    assert comparison["baseline"] == "large"
    assert arms["large"]["loss_against_baseline"] is None
    assert arms["small"]["loss_against_baseline"] == dataclasses.asdict(interval([0.25, 0.375]))
    assert main.main(["compare", str(sweep), "--baseline", "larger"]) == 2
    assert capsys.readouterr().err == (
        "engram-jax: baseline = 'larger': no such arm; there are bare, large, small\n")


def test_a_run_that_diverged_is_refused_by_name(sweep, capsys):
    lost = write(sweep / "large-seed3", seeded(ARMS["large"], "large", 3))
    rows = [{"step": 1, "learning/loss": 5.0}, {"step": 2, "not_finite": ["learning/loss"]}]
    (lost / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main.main(["compare", str(sweep)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"engram-jax: {lost}: diverged")
    assert len(line.splitlines()) == 1


def test_arms_that_differ_in_more_than_the_axis_are_refused_by_name(sweep, capsys):
    rows = ["--axis", "model.engram.rows_per_head"]
    both = [str(sweep / "small-seed0"), str(sweep / "large-seed0")]
    assert main.main(["compare", *both, *rows]) == 0
    assert main.main(["compare", str(sweep), "--axis", "model.engram"]) == 0
    longer = dataclasses.replace(with_training(larger(1024), steps=9), name="longer")
    write(sweep / "longer", longer, 4.0)
    capsys.readouterr()
    assert main.main(["compare", *both, str(sweep / "longer"), *rows]) == 2
    assert capsys.readouterr().err == (
        "engram-jax: axis = 'model.engram.rows_per_head': longer differs from small in more than "
        f"that (training.steps: {STEPS} and 9)\n")
    assert main.main(["compare", *both, str(sweep / "longer"), *rows,
                      "--axis", "training.steps"]) == 0
    capsys.readouterr()
    assert main.main(["compare", *both, "--axis", "model.rows"]) == 2
    assert capsys.readouterr().err == (
        "engram-jax: axis = 'model.rows': is no field of these runs\n")


def test_an_arm_without_a_finished_run_has_no_loss(tmp_path, capsys):
    place = write(tmp_path / "run", seeded(BASE, "new", 0))
    assert main.main(["compare", str(place)]) == 0
    line = capsys.readouterr().out.splitlines()[2].split()
    assert line[:2] == ["new", "0"]
    assert line[-5:] == ["-"] * 5
    assert RunDirectory(place).result() is None


def test_folders_that_hold_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no run \(there is no config.json in it or in"):
            comparing.arms([folder])
    assert main.main(["compare", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
