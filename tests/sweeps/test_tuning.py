"""The search: as many trials of each kind, and each sets what it says."""

from experiments.tuning import best, configs, report


def test_each_kind_has_as_many_trials_and_no_two_alike():
    assert {len(trials) for trials in configs.TRIALS.values()} == {12}
    for trials in configs.TRIALS.values():
        assert len(set(trials)) == len(trials)
    runs = {run.name.removesuffix("-seed3"): run for run in configs.runs("tiny", (3, 4))}
    assert list(runs) == list(configs.TRIALS_BY_ARM), "the first seed alone"
    for name, trial in configs.TRIALS_BY_ARM.items():
        run = runs[name]
        memory = run.model.engram or run.model.over_encoding
        assert (memory is None) == name.startswith("no-memory")
        assert (run.model.over_encoding is None) != name.startswith("over-encoding")
        assert run.optimizer.learning_rate == trial.rate
        assert run.model.embedding_std == trial.embedding_std
        if memory is not None:
            assert memory.table_std == trial.table_std
            assert run.optimizer.table_optimizer == trial.table_optimizer
            assert run.optimizer.table_multiplier == trial.multiplier


def test_the_best_of_a_kind_is_set_on_any_run_of_it():
    bases = configs.bases(7)
    for kind, arm in best.BEST.items():
        assert arm.startswith(kind)
        assert best.tuned(bases[kind]) == configs.TRIALS_BY_ARM[arm].on(bases[kind])


def test_the_table_has_the_best_of_each_kind_first():
    losses = {"engram-0": 4.5, "engram-1": 4.25, "engram-2": float("nan"), "no-memory-0": 4.75}
    rows = [{"name": f"{arm}-seed0", "seed": 0, "loss": loss} for arm, loss in losses.items()]
    lines = report.table(rows).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["no-memory-0", "4.7500"], ["engram-1", "4.2500"], ["engram-0", "4.5000"],
        ["engram-2", "nan"]]
    assert len(report.figure(rows).axes) == 1
