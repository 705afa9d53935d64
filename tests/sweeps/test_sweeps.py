"""A sweep: its runs, table and figure, what it skips and what it refuses; the experiments' runs."""

import dataclasses
import importlib
import math
import shutil
import types

import pytest
from micro import micro, plain, with_model, with_training, write_text

from engram_jax.cli import main
from engram_jax.costs import forecast
from engram_jax.costs.accounting import account
from engram_jax.costs.allocation import matched_baseline
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import sites
from engram_jax.recipes import RECIPES, with_over_encoding
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.divergence import Diverged
from engram_jax.settings import first_difference, to_dict, with_settings
from engram_jax.sweeps import member, sweep
from engram_jax.sweeps.sweep import Sweep, from_csv, run_sweep, seeded, to_csv
from engram_jax.tables.layout import TableLayout
from engram_jax.tables.memory import Memory
from engram_jax.tables.row_optimizers import RowRmsPropState
from experiments.memory_scaling import report

pytestmark = pytest.mark.usefixtures("compilations")
FIELDS = {"name", "slots", "memory_params", "total_params", "active_params", "loss",
          "bits_per_byte", "tokens_per_s", "seed", "text", "experts", "rho", "flops_per_token"}
EXPERIMENTS = ("ablations", "allocation", "controls", "layer_sweep", "memory_scaling")
NAMES = ["no-memory", "engram-8", "engram-32", "engram-128", "over-encoding-128"]


def silent(line):
    del line


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    base = with_training(plain(micro(text)), checkpoint_every=0)

    def sized(slots):
        engram = dataclasses.replace(base.model.engram, rows_per_head=(slots, slots))
        return dataclasses.replace(with_model(base, engram=engram), name=f"engram-{slots}")

    sizes = [sized(slots) for slots in (8, 32, 128)]
    over = dataclasses.replace(with_over_encoding(sizes[-1]), name="over-encoding-128")
    return [matched_baseline(base), *sizes, over]


@pytest.fixture(scope="module")
def micro_sweep(arms):
    """An experiment `micro` of these arms, and its sweep with one seed."""
    configs = types.SimpleNamespace(SCALES={"tiny": None, "small": None},
                                    runs=lambda scale, seeds: seeded(arms, seeds))
    made = {"configs": configs, "report": report}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "experiments", lambda: ["micro"])
        patch.setattr(sweep, "_module", lambda experiment, name: made[name])
        yield Sweep(experiment="micro", seeds=(0,))


@pytest.fixture(scope="module")
def swept(micro_sweep, tmp_path_factory):
    """The folder of the sweep, interrupted in its third run and then finished, and its lines."""
    place, said = tmp_path_factory.mktemp("sweep"), []
    with pytest.MonkeyPatch.context() as stopping:
        stopping.setattr(member, "train", stopped_at(member.train, "engram-32-seed0"))
        with pytest.raises(KeyboardInterrupt):
            run_sweep(micro_sweep, place, silent, allow_dirty=True)
    assert not (place / "results.csv").exists()
    run_sweep(micro_sweep, place, said.append, allow_dirty=True)
    return place, said


def stopped_at(train, name):
    def stopping(run, directory, say, mesh):
        if run.name == name:
            raise KeyboardInterrupt
        return train(run, directory, say, mesh)

    return stopping


def results(place):
    return from_csv((place / "results.csv").read_text())


def test_results_hold_a_line_for_each_run(swept, micro_sweep):
    found = results(swept[0])
    assert [result["name"] for result in found] == [f"{name}-seed0" for name in NAMES]
    assert all(set(result) >= FIELDS for result in found)
    assert [result["slots"] for result in found] == [0, 8, 32, 128, 128]
    for result, run in zip(found, micro_sweep.runs(), strict=True):
        assert result["memory_params"] == account(run).engram_params
        assert result["total_params"] == account(run).total_params
        assert result["active_params"] == account(run).active_params
        assert result["flops_per_token"] == account(run).flops_per_token
        assert result["text"] == "text.txt"
        assert result == RunDirectory(swept[0] / run.name).result()  # to the bit
        assert 0 < result["loss"] < 6.5
        assert result["tokens_per_s"] > 0
    assert found[0]["memory_params"] == 0


def test_finished_runs_are_skipped(swept):
    done = [line for line in swept[1] if "done before" in line]
    assert [line.split(":")[0] for line in done] == ["no-memory-seed0", "engram-8-seed0"]


def test_table_and_figure_stand_beside_the_results(swept):
    text = (swept[0] / "table.txt").read_text()
    assert all(name in text for name in NAMES)
    assert "log10(slots)" in text
    assert (swept[0] / report.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_does_not_stop_the_others(
    swept, micro_sweep, tmp_path, monkeypatch, capsys
):
    train, trained = member.train, []

    def diverging(run, directory, say, mesh):
        trained.append(run.name)
        if run.name == "engram-32-seed0":
            shutil.copytree(swept[0] / run.name, directory)
            (directory / "result.json").unlink()
            raise Diverged("diverged at step 2: learning/loss is nan")
        return train(run, swept[0] / run.name, say, mesh)

    monkeypatch.setattr(member, "train", diverging)
    words = ["sweep", "micro", "--seeds", "1", "--out", str(tmp_path), "--allow-dirty"]
    assert main.main(words) == 1
    said = capsys.readouterr()
    assert "engram-32-seed0: diverged at step 2: learning/loss is nan" in said.out
    assert said.err == "engram-jax: engram-32-seed0: diverged; the table has the others\n"
    losses = {result["name"]: result["loss"] for result in results(tmp_path)}
    assert [name for name, loss in losses.items() if math.isnan(loss)] == ["engram-32-seed0"]
    table = (tmp_path / "table.txt").read_text()
    assert "engram-32-seed0: diverged" in table
    assert "text.txt, Engram: no line, for engram-32-seed0 diverged" in table

    (tmp_path / "table.txt").unlink()
    trained.clear()
    assert main.main(words) == 1, "the same again: it has come to its end"
    assert "engram-32-seed0" not in trained
    again = capsys.readouterr()
    assert f"remove {tmp_path}/engram-32-seed0/diverged.json to try again" in again.out
    assert again.err == said.err
    assert (tmp_path / "table.txt").read_text() == table
    (tmp_path / "table.txt").unlink()
    assert main.main([*words, "--so-far"]) == 0
    told = capsys.readouterr().out
    assert "engram-32-seed0: diverged" in told
    assert told.splitlines()[-1].endswith("runs are done, of which diverged: engram-32-seed0")
    (tmp_path / "engram-32-seed0/diverged.json").unlink()
    assert main.main(words) == 1
    assert "engram-32-seed0" in trained


def test_a_finished_sweep_trains_nothing(swept, micro_sweep, monkeypatch):
    monkeypatch.setattr("engram_jax.runs.train.open_inputs", None)
    before = results(swept[0])
    again = run_sweep(micro_sweep, swept[0], silent, allow_dirty=True)
    assert again == before == results(swept[0])


def test_what_is_done_so_far_is_reported_and_nothing_trained(
    swept, micro_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr("engram_jax.runs.train.open_inputs", None)
    with pytest.raises(UserError, match=r"out = .*holds no run of this sweep that is done"):
        sweep.report_so_far(micro_sweep, tmp_path, silent)
    assert not list(tmp_path.iterdir())
    for name in ("sweep.json", "no-memory-seed0", "engram-32-seed0"):
        (tmp_path / name).symlink_to(swept[0] / name)
    said = []
    assert sweep.report_so_far(micro_sweep, tmp_path, said.append) == 2
    assert said[-1] == "2 of 5 runs are done"
    names = [result["name"] for result in results(tmp_path)]
    assert names == ["no-memory-seed0", "engram-32-seed0"]
    assert "engram-32" in (tmp_path / "table.txt").read_text()
    with pytest.raises(UserError, match=r"scale = 'small': .*holds a sweep with 'tiny'"):
        sweep.report_so_far(dataclasses.replace(micro_sweep, scale="small"), tmp_path, silent)


def test_a_folder_of_another_sweep_is_refused_and_stays_as_it_is(swept, micro_sweep):
    before = {path: path.read_bytes() for path in swept[0].rglob("*") if path.is_file()}
    for other, line in (
        (dataclasses.replace(micro_sweep, scale="small"),
         r"scale = 'small': .*holds a sweep with 'tiny'"),
        (dataclasses.replace(micro_sweep, settings=("training.steps=9",)),
         r"settings = \['training.steps=9'\]: .*holds a sweep with \[\]"),
    ):
        with pytest.raises(UserError, match=line):
            run_sweep(other, swept[0], silent, allow_dirty=True)
    assert before == {path: path.read_bytes() for path in swept[0].rglob("*") if path.is_file()}


def test_results_of_another_config_in_the_folder_are_refused(swept, micro_sweep, tmp_path):
    run = micro_sweep.runs()[0]
    (tmp_path / run.name).mkdir()
    for name in ("config.json", "result.json"):
        text = (swept[0] / run.name / name).read_text()
        (tmp_path / run.name / name).write_text(text.replace('"steps": 7', '"steps": 8'))
    with pytest.raises(UserError, match=r"training.steps = 7: .*no-memory-seed0 holds a run with"):
        run_sweep(micro_sweep, tmp_path, silent, allow_dirty=True)


def test_a_checkout_with_changes_is_refused_unless_told(micro_sweep, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "git_revision", lambda: "0123abcd+changes")
    with pytest.raises(UserError, match=r"git = 'uncommitted changes': .*--allow-dirty"):
        run_sweep(micro_sweep, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_settings_reach_every_run(micro_sweep):
    changed = dataclasses.replace(micro_sweep, settings=("training.steps=9",))
    assert {run.training.steps for run in changed.runs()} == {9}


def test_runs_by_their_names(micro_sweep):
    two = dataclasses.replace(micro_sweep, seeds=(0, 1))
    assert two.runs("*") == two.runs()
    assert [run.name for run in two.runs("engram-8-seed*")] == ["engram-8-seed0", "engram-8-seed1"]
    said = []
    sweep.dry_run(two, said.append, match="no-memory-*")
    assert "2 runs" in "\n".join(said)
    with pytest.raises(UserError, match=r"match = 'engram': no run has such a name; .*no-memory-s"):
        two.runs("engram")


def test_runs_by_their_names_are_trained_and_not_reported(micro_sweep, tmp_path):
    place = tmp_path / "some"
    results = run_sweep(micro_sweep, place, silent, match="no-memory-*", allow_dirty=True)
    assert [result["name"] for result in results] == ["no-memory-seed0"]
    assert sorted(path.name for path in place.iterdir()) == ["no-memory-seed0", "sweep.json"]
    assert sweep.report_so_far(micro_sweep, place, silent) == 1


def test_a_sweep_that_did_not_begin_leaves_the_folder_to_others(micro_sweep, tmp_path):
    wrong = dataclasses.replace(micro_sweep, settings=("data.path=/nowhere",))
    with pytest.raises(UserError, match=r"data.path = '/nowhere'"):
        run_sweep(wrong, tmp_path / "out", silent, allow_dirty=True)
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_shares_that_did_not_begin_together(micro_sweep, tmp_path, monkeypatch):
    """Jobs of an array fail alike, and each takes the folder back."""
    def launcher(runs, folder, say, mesh):
        removed = type(folder).unlink
        monkeypatch.setattr(type(folder), "unlink", lambda path, **how: [
            removed(path), removed(path, **how)])  # the other job was a moment earlier
        raise UserError("data.path = '/nowhere': nothing there")

    with pytest.raises(UserError, match="nothing there"):
        run_sweep(micro_sweep, tmp_path / "out", silent, launcher=launcher, only=(0, 2),
                  allow_dirty=True)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("word", "value"), [("match", "no-memory-*"), ("only", "1/2")])
def test_a_table_of_what_is_done_is_of_all_runs(swept, capsys, word, value):
    before = (swept[0] / "results.csv").read_bytes()
    words = ["sweep", "micro", "--out", str(swept[0]), "--so-far", f"--{word}", value]
    assert main.main(words) == 2
    assert f"{word} = '{value}': picks the runs that are trained" in capsys.readouterr().err
    assert (swept[0] / "results.csv").read_bytes() == before


def test_runs_need_names_of_their_own(micro_sweep):
    with pytest.raises(UserError, match="every run of a sweep needs its own"):
        dataclasses.replace(micro_sweep, settings=("name=same",)).runs()


def test_seeds_are_paired(arms):
    runs = seeded(arms, (3, 5))
    assert [run.name for run in runs[:2]] == ["no-memory-seed3", "engram-8-seed3"]
    assert [(run.data.seed, run.training.seed) for run in runs] == [(3, 3)] * 5 + [(5, 5)] * 5


@pytest.mark.parametrize(("change", "line"), [
    ({"experiment": "nope"}, r"experiment = 'nope': no such experiment; there are micro"),
    ({"scale": "huge"}, r"scale = 'huge': micro has tiny, small"),
    ({"seeds": ()}, r"seeds = \[\]: must be one or more"),
    ({"seeds": (0, -1)}, r"seeds = \[0, -1\]: must be one or more"),
    ({"seeds": (0, 2, 1, 2)}, r"seeds = \[0, 2, 1, 2\]: has 2 more than once"),
])
def test_what_is_no_sweep(micro_sweep, change, line):
    with pytest.raises(UserError, match=line):
        dataclasses.replace(micro_sweep, **change)


def test_numbers_survive_the_table_to_the_bit():
    rows = [{"name": "a-seed1", "loss": 0.1 + 0.2, "seed": 1, "rho": None, "text": "x, y\n"},
            {"name": "b", "loss": 1e-300, "seed": 12345678901234567890, "rho": 1.0, "text": "z"}]
    assert from_csv(to_csv(rows)) == rows


# --- The dry run ---


def test_a_dry_run_says_what_every_run_takes(micro_sweep, monkeypatch):
    said = []
    sweep.dry_run(micro_sweep, said.append)
    text = "\n".join(said)
    assert all(f"{name}-seed0" in text for name in NAMES)
    assert "5 runs" in text
    monkeypatch.setattr(forecast, "device_bytes", lambda mesh: 1000)
    with pytest.raises(UserError, match=r"run = 'no-memory-seed0': needs .* MB .* have 0.0 MB"):
        sweep.dry_run(micro_sweep, said.append)
    assert "no" in said[-1].split()
    monkeypatch.setattr(forecast, "device_bytes", lambda mesh: 10**6)
    sweep.dry_run(micro_sweep, said.append)
    with pytest.raises(UserError, match=r"^at-once = 90: runs need"):
        sweep.dry_run(dataclasses.replace(micro_sweep, seeds=tuple(range(20))), said.append,
                      at_once=90)


def test_what_does_not_fit_is_not_begun(micro_sweep, monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "device_bytes", lambda mesh: 1000)
    with pytest.raises(UserError, match="needs"):
        run_sweep(micro_sweep, tmp_path / "out", silent, allow_dirty=True)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_together_is_not_begun_at_once(arms):
    forecasts = [dataclasses.replace(forecast.forecast(arms[1]), memory_bytes=memory,
                                     available_bytes=10**9) for memory in (4e8, 1e8, 5e8, 2e8)]
    forecast.check(forecasts, 2)
    with pytest.raises(UserError, match=r"^at-once = 3: runs need 1\.1 GB .* have 1\.0 GB: take"):
        forecast.check(forecasts, 3)
    forecast.check([], 3)


def test_a_forecast_counts_state_and_gradients(arms):
    run = arms[1]
    found, numbers = forecast.forecast(run), account(run)
    assert found.tokens == 7 * 4 * 16
    assert found.flops == numbers.flops_per_token * found.tokens
    embedding = run.model.vocab_size * run.model.width
    parameters = numbers.total_params - numbers.engram_params + embedding
    assert found.memory_bytes > 4 * (3 * parameters + 3 * numbers.engram_params)
    assert found.memory_bytes < 4 * (4.2 * parameters + 4.2 * numbers.engram_params)
    assert found.seconds > 0
    assert found.fits


# --- The experiments ---


def configs(experiment):
    return importlib.import_module(f"experiments.{experiment}.configs")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_of_one_cost(experiment):
    """At the tiny scale all arms of a budget train on as many tokens at the same FLOPs."""
    runs = configs(experiment).runs("tiny", (0,))
    budgets = {run.name.partition("-rho-")[0] if "-rho-" in run.name else "" for run in runs}
    for budget in budgets:
        found = [run for run in runs if run.name.startswith(budget)]
        cost = account(found[0]).flops_per_token
        # A split module has projections twice; the paper's layer sweep has the same.
        tolerance = 0.03 if experiment == "layer_sweep" else 0.01
        for run in found:
            assert account(run).flops_per_token == pytest.approx(cost, rel=tolerance), run.name
            assert run.training.steps == found[0].training.steps


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "row_optimizers"])
def test_every_scale_has_arms_of_their_own_names(experiment):
    module = configs(experiment)
    for scale in module.SCALES:
        names = [run.name for run in module.runs(scale, (0, 1))]
        assert len(set(names)) == len(names)
        assert all(name.endswith(("-seed0", "-seed1")) for name in names)


@pytest.mark.parametrize("experiment", [
    "memory_scaling", "controls", "layer_sweep", "allocation", "ablations"])
def test_committed_tables_can_be_made_again(experiment):
    """They were trained when row Adam was the default; other scales have today's."""
    module = configs(experiment)
    for scale in module.SCALES:
        wanted = "row_adam" if scale == "tiny" else "row_rmsprop"
        assert {run.optimizer.table_optimizer for run in module.runs(scale, (0,))} == {wanted}


def test_recipes_and_the_part_train_tables_alike():
    assert {make().optimizer.table_optimizer for make in RECIPES.values()} == {"row_rmsprop"}
    layout = TableLayout(rows=4, dim=2, shards=1)
    assert isinstance(Memory.optimizer.init(layout), RowRmsPropState)


def test_an_ablation_changes_what_its_name_says():
    reference, *others = configs("ablations").arms(configs("ablations").SCALES["tiny"]())
    changed = {}
    for arm in others[:-1]:
        before, after = to_dict(reference.model.engram), to_dict(arm.model.engram)
        changed[arm.name] = {key for key in before if before[key] != after[key]}
    assert changed == {
        "one-branch": {"per_branch"}, "no-compression": {"compress"}, "no-gate": {"gated"},
        "4-grams": {"max_order", "rows_per_head", "dilation"}, "no-convolution": {"kernel"},
        "no-signed-root": {"signed_root"}, "random-start": {"table_std"},
        "one-table": {"one_table", "rows_per_head"}, "rate-x1": set(), "rate-x20": set()}
    rows = account(reference).engram_params
    for name in ("4-grams", "one-table"):
        arm = next(arm for arm in others if arm.name == name)
        assert account(arm).engram_params == pytest.approx(rows, rel=0.02)


def test_layers_share_one_budget_of_rows():
    runs = configs("layer_sweep").runs("tiny", (0,))
    rows = {account(run).engram_params for run in runs if run.model.engram}
    assert max(rows) == pytest.approx(min(rows), rel=0.01)
    assert [run.model.engram.layers for run in runs if run.model.engram] == [
        (0,), (1,), (2,), (3,), (4,), (5,), (1, 3)]


def test_the_demo_compares_one_backbone_on_one_text():
    """But for memory, name, and the dense FFN that pays for it."""
    runs = configs("memory_scaling").runs("tiny", (0,))
    slots = configs("memory_scaling").SCALES["tiny"][1]
    assert [run.model.engram.rows_per_head[0] for run in runs if run.model.engram] == [*slots]
    over = [run for run in runs if run.model.over_encoding]
    size = runs[0].model.embedding_std
    assert {run.model.embedding_std for run in over} == {size * 9}  # it is divided again
    same = ["name=x", f"model.embedding_std={size}", "model.ffn=256", "model.engram=none",
            "model.over_encoding=none"]
    bare = [to_dict(with_settings(run, same)) for run in runs]
    assert all(first_difference(bare[0], other) is None for other in bare)
    assert all(sites(run.model) for run in runs[1:])


def test_controls_differ_in_their_keys_alone():
    bare, *memories = configs("controls").runs("tiny", (0,))
    assert bare.model.engram is None
    assert [run.model.engram.keys for run in memories] == ["ngrams", "shuffled", "random"]
    same = [to_dict(with_settings(run, ["name=x", "model.engram.keys=ngrams"]))
            for run in memories]
    assert all(first_difference(same[0], other) is None for other in same)
