"""A sweep: its table and figure, what it skips, the line through it, and the demo's runs."""

import dataclasses
import json

import numpy as np
import pytest
from micro import micro, plain, with_model, with_training, write_text

from engram_jax import sweeps
from engram_jax.accounting import account
from engram_jax.analysis import scaling
from engram_jax.errors import UserError
from engram_jax.memory.sites import sites
from engram_jax.recipes import with_over_encoding, without_memory
from engram_jax.settings import first_difference, to_dict, with_settings
from engram_jax.training.records import RunDirectory
from experiments.memory_scaling.configs import SLOTS, runs

pytestmark = pytest.mark.usefixtures("compilations")
FIELDS = {"name", "slots", "memory_params", "total_params", "active_params", "loss",
          "bits_per_byte", "tokens_per_s", "seed"}


def silent(line):
    del line


@pytest.fixture(scope="module")
def micro_runs(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    base = with_training(plain(micro(text)), checkpoint_every=0)

    def sized(slots):
        engram = dataclasses.replace(base.model.engram, rows_per_head=(slots, slots))
        return dataclasses.replace(with_model(base, engram=engram), name=f"engram-{slots}")

    sizes = [sized(slots) for slots in (8, 32, 128)]
    over = dataclasses.replace(with_over_encoding(sizes[-1]), name="over-encoding-128")
    return [dataclasses.replace(without_memory(base), name="no-memory"), *sizes, over]


@pytest.fixture(scope="module")
def swept(micro_runs, tmp_path_factory):
    """The folder of the sweep, interrupted in its third run and then finished, and its lines."""
    place, said = tmp_path_factory.mktemp("sweep"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "experiment", lambda name: micro_runs)
        with patch.context() as stopping:
            stopping.setattr(sweeps, "train", stopped_at(sweeps.train, "engram-32"))
            with pytest.raises(KeyboardInterrupt):
                sweeps.sweep("micro", place, say=silent)
        assert not (place / "results.json").exists()
        sweeps.sweep("micro", place, say=said.append)
    return place, said


def stopped_at(train, name):
    def stopping(run, directory, say, mesh):
        if run.name == name:
            raise KeyboardInterrupt
        return train(run, directory, say, mesh)

    return stopping


def results(place):
    return json.loads((place / "results.json").read_text())


def test_results_hold_an_object_for_each_run(swept, micro_runs):
    found = results(swept[0])
    assert [result["name"] for result in found] == [run.name for run in micro_runs]
    assert all(set(result) >= FIELDS for result in found)
    assert [result["slots"] for result in found] == [0, 8, 32, 128, 128]
    for result, run in zip(found, micro_runs, strict=True):
        assert result["memory_params"] == account(run).engram_params
        assert result["total_params"] == account(run).total_params
        assert result["active_params"] == account(run).active_params
        assert result == RunDirectory(swept[0] / run.name).result()
        assert 0 < result["loss"] < 6.5
        assert result["tokens_per_s"] > 0
    assert found[0]["memory_params"] == 0


def test_finished_runs_are_skipped(swept):
    done = [line for line in swept[1] if "done before" in line]
    assert [line.split(":")[0] for line in done] == ["no-memory", "engram-8"]


def test_table_and_figure_stand_beside_the_results(swept, micro_runs):
    text = (swept[0] / "table.txt").read_text()
    for run in micro_runs:
        assert run.name in text
    assert "log10(slots)" in text
    assert (swept[0] / "loss_against_slots.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_sweep_trains_nothing(swept, micro_runs, monkeypatch):
    monkeypatch.setattr(sweeps, "experiment", lambda name: micro_runs)
    monkeypatch.setattr("engram_jax.training.loop.open_inputs", None)
    before = results(swept[0])
    assert sweeps.sweep("micro", swept[0], say=silent) == before == results(swept[0])


def test_settings_reach_every_run(swept, micro_runs, monkeypatch):
    monkeypatch.setattr(sweeps, "experiment", lambda name: micro_runs)
    with pytest.raises(UserError, match=r"training.steps = 9: .*no-memory.* holds a run with 7"):
        sweeps.sweep("micro", swept[0], ["training.steps=9"], silent)


def test_runs_need_names_of_their_own(micro_runs, monkeypatch, tmp_path):
    monkeypatch.setattr(sweeps, "experiment", lambda name: micro_runs)
    with pytest.raises(UserError, match="every run of a sweep needs its own"):
        sweeps.sweep("micro", tmp_path, ["name=same"], silent)


def test_unknown_experiment():
    with pytest.raises(UserError, match=r"experiment = 'nope': .*memory_scaling"):
        sweeps.experiment("nope")
    assert [run.name for run in sweeps.experiment("memory_scaling")] == [r.name for r in runs()]


# --- The line ---


def made(losses, slots=(1000, 4000, 16_000, 64_000)):
    return [{"name": f"engram-{s}", "memory": "Engram", "slots": s, "loss": y}
            for s, y in zip(slots, losses, strict=True)]


def test_the_fit_is_least_squares_and_its_interval_student_t():
    found = scaling.fit(made([4.57, 4.541, 4.513, 4.445]))
    x, y = np.log10([1000, 4000, 16_000, 64_000]), np.array([4.57, 4.541, 4.513, 4.445])
    slope, intercept = np.polyfit(x, y, 1)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    residual = y - intercept - slope * x
    error = np.sqrt(np.sum(residual**2) / 2 / np.sum((x - x.mean())**2))
    margin = 4.302653 * error  # the 97.5 % point of Student's t with two degrees of freedom
    assert (found.low, found.high) == pytest.approx((slope - margin, slope + margin), rel=1e-5)
    assert found.points == 4
    np.testing.assert_allclose(found(np.array([1e4])), intercept + slope * 4)


def test_the_fit_needs_three_sizes_of_engram():
    assert scaling.fit(made([4.5, 4.4], (10, 20))) is None
    assert scaling.fit(made([4.5, 4.4, 4.4], (10, 20, 20))) is None
    over = {"name": "over", "memory": "OverEncoding", "slots": 40, "loss": 1.0}
    none = {"name": "bare", "memory": "no memory", "slots": 0, "loss": 9.0}
    assert scaling.fit([none, *made([4.5, 4.4], (10, 20)), over]) is None
    assert scaling.fit([none, *made([4.5, 4.4, 4.3], (10, 20, 40)), over]).points == 3


# --- The demo's runs ---


def test_the_demo_compares_one_backbone_on_one_text():
    found = runs()
    assert len(found) == 6
    assert len({run.name for run in found}) == 6
    over, size = found[-1].model, found[0].model.embedding_std
    assert over.embedding_std == size * (1 + over.over_encoding.total_heads)  # it is divided again
    found[-1] = with_settings(found[-1], [f"model.embedding_std={size}"])
    bare = [{**to_dict(without_memory(run)), "name": ""} for run in found]
    assert all(first_difference(bare[0], other) is None for other in bare)
    memories = [run.model.engram or run.model.over_encoding for run in found]
    assert memories[0] is None
    assert [memory.rows_per_head[0] for memory in memories[1:]] == [*SLOTS, SLOTS[-1]]
    assert found[-1].model.engram is None
    assert all(sites(run.model) for run in found[1:])
    assert tuple(sorted(SLOTS)) == SLOTS
    assert len(SLOTS) == 4


def test_the_demo_takes_settings():
    assert all(with_settings(run, ["data.path=my.txt"]).data.path == "my.txt" for run in runs())
