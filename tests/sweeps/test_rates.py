"""The rates experiment: rates alone differ, and each arm is compared at its own best."""

from engram_jax.results.statistics import interval
from engram_jax.settings import to_dict
from experiments.rates import configs, report
from experiments.tokens import configs as tokens


def test_arms_are_those_of_tokens_at_other_rates():
    of_tokens = {run.name: run for run in tokens.runs("tiny", (0,))}
    for scale in configs.SCALES:
        for run in configs.runs(scale, (0,)):
            arm, _, rest = run.name.partition("-rate-")
            rate, times, _ = rest.split("-")
            ours, theirs = to_dict(run), to_dict(of_tokens[f"allocation-{arm}-{times}-seed0"])
            assert ours["optimizer"].pop("learning_rate") == float(rate)
            assert theirs["optimizer"].pop("learning_rate") == max(configs.RATES)
            assert {**ours, "name": ""} == {**theirs, "name": ""}


def test_two_arms_of_a_rate_come_together_and_short_runs_first():
    names = [run.name for run in configs.runs("tiny", (0, 1))]
    assert names[:3] == ["rho-1-rate-0.004-1x-seed0", "rho-0.4-rate-0.004-1x-seed0",
                         "rho-1-rate-0.008-1x-seed0"]
    assert names[8] == "rho-1-rate-0.004-1x-seed1"
    assert names[16] == "rho-1-rate-0.004-4x-seed0"


def made(arm, rate, seed, loss, times=1):
    return {"name": f"{arm}-rate-{rate}-{times}x-seed{seed}", "seed": seed, "loss": loss,
            "tokens": 1000 * times}


def test_each_arm_at_its_own_best_rate():
    results = [made("rho-1", "0.008", 0, 4.5), made("rho-1", "0.016", 0, 4.0),
               made("rho-1", "0.016", 1, 5.0), made("rho-1", "0.008", 1, 4.25),
               made("rho-0.4", "0.008", 0, 4.25), made("rho-0.4", "0.008", 1, 4.5),
               made("rho-0.4", "0.016", 0, 3.75), made("rho-0.4", "0.016", 1, 4.25),
               made("rho-0.4", "0.032", 0, 3.0),
               made("rho-1", "0.016", 0, 3.5, 4), made("rho-0.4", "0.016", 0, float("nan"), 4)]
    told = report.losses(results)
    assert report.best(told, 1000, "rho-1") == (1000, "rho-1", 0.008)
    assert report.best(told, 1000, "rho-0.4") == (1000, "rho-0.4", 0.016), "of most seeds"
    assert report.best(told, 4000, "rho-0.4") is None
    text = report.table(results)
    assert (f"1,000 tokens: rho 0.4 at 0.016 less experts alone at 0.008: "
            f"{interval([-0.75, 0.0]).signed()} [2]") in text
    assert text.endswith("rho-0.4-rate-0.016-4x-seed0: diverged")
    assert len(report.figure(results).axes) == 2
