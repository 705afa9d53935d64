"""The tokens experiment: one change at a time, and a table of whatever is done."""

import pytest

from engram_jax.costs.accounting import account
from engram_jax.results.statistics import interval
from experiments.tokens import configs, report


@pytest.mark.parametrize("scale", configs.SCALES)
def test_arms_of_a_budget_differ_in_their_model_and_rates_alone(scale):
    for group, arms in configs.arms(scale).items():
        costs = {account(arm).flops_per_token for arm in arms}
        assert not arms or max(costs) < 1.01 * min(costs), group
        steps = {}
        for arm in arms:
            there, name, times = report.split(arm.name)
            assert there == group
            steps.setdefault(name, {})[times] = arm.training.steps
            assert arm.data.path == configs.TEXT
            assert arm.training.checkpoint_every == 100
        one = next(iter(steps.values()), {})
        assert all(each == one for each in steps.values()), "as many steps in every arm"
        assert all(count == times * (170 if group == "allocation" else 130)
                   for times, count in one.items())


def test_the_most_telling_runs_come_first():
    names = [run.name for run in configs.runs("tiny", (0, 1))]
    assert names[:4] == [f"allocation-rho-{rho}-1x-seed0" for rho in ("1", "0.8", "0.6", "0.4")]
    assert names[4] == "allocation-rho-1-4x-seed0"
    assert names[12] == "allocation-rho-1-1x-seed1"
    assert names[24] == "ablations-reference-1x-seed0"
    assert [run.name for run in configs.runs("long", (0,))] == [
        f"allocation-rho-{rho}-64x-seed0" for rho in ("1", "0.8", "0.4")]


def made(arm, seed, loss):
    return {"name": f"{arm}-seed{seed}", "seed": seed, "loss": loss,
            "tokens": 1000 * report.split(arm)[2]}


def test_effects_are_of_one_seed_and_one_budget():
    results = [made("allocation-rho-1-1x", 0, 5.0), made("allocation-rho-0.8-1x", 0, 4.5),
               made("allocation-rho-1-4x", 0, 4.0), made("allocation-rho-0.8-4x", 0, 3.75),
               made("allocation-rho-1-1x", 1, 5.25), made("allocation-rho-0.8-1x", 1, 4.5),
               made("allocation-rho-0.8-16x", 0, 3.0),
               made("ablations-reference-1x", 0, 4.0),
               made("ablations-no-gate-1x", 0, float("nan"))]
    assert report.effects(results, "allocation") == {
        "rho-0.8": {1000: interval([-0.5, -0.75]), 4000: interval([-0.25])}}
    assert report.effects(results, "ablations") == {}
    text = report.table(results)
    assert "-0.6250 (-2.2133 to +0.9633) [2]" in text
    assert "-0.2500 [1]     -0.0122" in text, "the paper's effect last"
    assert "allocation: 1,000 tokens, seeds 0, 1" in text
    assert text.endswith("ablations-no-gate-1x-seed0: diverged")
    assert len(report.figure(results).axes) == 2
