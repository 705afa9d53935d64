"""Sparse parameters divided anew: targets met on the counted tree, and what cannot be met."""

import dataclasses

import pytest

from engram_jax.config import EngramConfig, MoEConfig
from engram_jax.costs import allocation
from engram_jax.costs.accounting import account
from engram_jax.costs.allocation import allocate, matched_baseline, with_flops, with_parameters
from engram_jax.errors import UserError
from engram_jax.recipes import recipe
from engram_jax.settings import changed
from experiments.allocation.configs import PAPER, RHOS, SCALES, described

TINY_BASES = [pytest.param(*pair, id=pair[0].name) for pair in SCALES["tiny"]]


def countable(run):
    numbers = account(run)
    return numbers.active_params + numbers.sparse_params


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize(("base", "memory"), TINY_BASES)
def test_every_point_has_the_parameters_and_the_cost_of_the_undivided_model(base, memory, rho):
    point = allocate(base, rho, memory)
    before, after = account(base), account(point.run)
    assert countable(point.run) == pytest.approx(countable(base), rel=1e-3)
    assert after.flops_per_token == pytest.approx(before.flops_per_token, rel=1e-2)
    assert after.active_params == pytest.approx(before.active_params, rel=1e-2)
    assert point.rho == pytest.approx(rho, abs=0.5 / (base.model.moe.experts - 4) + 1e-9)
    # The share of the tree's own sparse parameters that is experts is the one that was asked for.
    assert after.rho == pytest.approx(point.rho, abs=2e-3)
    assert point.parameters_off == countable(point.run) / countable(base) - 1
    assert point.flops_off == after.flops_per_token / before.flops_per_token - 1


@pytest.mark.parametrize(("name", "total", "active", "expected"), [
    ("moe-6b", 5.7, 568, {0.4: 46, 1.0: 106}),
    ("moe-10b", 9.9, 993, {0.4: 43, 1.0: 99}),
])
def test_the_papers_budgets(name, total, active, expected):
    base = recipe(name)
    assert round(countable(base) / 1e9, 1) == total
    assert round(account(base).active_params / 1e6) == active
    for rho, experts in expected.items():
        assert allocate(base, rho, PAPER).run.model.moe.experts == experts
    budget = {"moe-6b": 2e20, "moe-10b": 6e20}[name]
    tokens = base.training.steps * base.data.batch_size * base.data.sequence_length
    assert 6 * account(base).active_params * tokens == pytest.approx(budget, rel=1e-3)


def test_engram_3b_is_the_papers_ablation_model():
    numbers = account(recipe("engram-3b"))
    assert round(numbers.engram_params / 1e9, 1) == 1.6
    assert round(countable(recipe("moe-3b")) / 1e9, 1) == 3.0
    assert round(account(recipe("moe-3b")).active_params / 1e6) == 568


def test_the_papers_27b_division_is_found_again():
    """rho 0.7435 of moe-27b is 55 experts; engram-27b has 2,262,400 rows and pays its FLOPs."""
    memory = dataclasses.replace(recipe("engram-27b").model.engram, rows_per_head=(2, 2))
    run = allocate(recipe("moe-27b"), 0.7435, memory).run
    assert run.model.moe.experts == 55
    assert run.model.engram.rows_per_head[0] == pytest.approx(2_262_400, rel=0.01)


def test_experts_alone_are_the_model_itself():
    base, memory = SCALES["tiny"][0]
    assert allocate(base, 1.0, memory).run is base


def test_without_a_dense_block_the_flops_must_do():
    base, memory = SCALES["tiny"][0]
    bare = changed(base, {"model.moe.dense_layers": 0})
    with pytest.raises(UserError, match=r"rho = 0.5: costs .* FLOPs a token .*dense block"):
        allocate(bare, 0.5, memory)
    thin = EngramConfig(layers=(1,), rows_per_head=(2, 2), heads=1, head_dim=1)
    point = allocate(bare, 0.9, thin)
    assert abs(point.flops_off) < 0.01
    assert point.run.model.ffn == bare.model.ffn


@pytest.mark.parametrize(("rho", "message"), [
    (0.0, r"rho = 0.0: must be in \(0, 1\]"),
    (1.2, r"rho = 1.2: must be in \(0, 1\]"),
    (0.001, r"rho = 0.001: leaves 4 experts of which 4 are picked; .* at least 0.005"),
])
def test_shares_that_no_model_has(rho, message):
    base, memory = SCALES["tiny"][0]
    with pytest.raises(UserError, match=message):
        allocate(base, rho, memory)


def test_rows_too_wide_for_the_parameters():
    base, memory = SCALES["tiny"][0]
    wide = dataclasses.replace(memory, head_dim=64, heads=16)
    with pytest.raises(UserError, match=r"model.ffn = -"):
        allocate(base, 0.9, wide)


def test_parameters_out_of_tolerance_are_refused(monkeypatch):
    base, memory = SCALES["tiny"][0]
    monkeypatch.setattr(allocation, "PARAMETER_TOLERANCE", 1e-7)
    with pytest.raises(UserError, match=r"rho = 0.4: gives .* parameters where .*-0.03%"):
        allocate(base, 0.4, memory)


def test_models_that_cannot_be_divided():
    tiny = recipe("tiny")
    with pytest.raises(UserError, match=r"model.moe = None: has no experts"):
        allocate(recipe("dense-4b"), 0.5, PAPER)
    with pytest.raises(UserError, match=r"model.engram = .*: is in the model already"):
        allocate(tiny, 0.5, PAPER)


def test_ffn_widths_stay_multiples_of_128_where_they_are():
    base = recipe("moe-6b")
    run = with_flops(base, account(base).flops_per_token * 98 // 100)
    assert run.model.ffn % 128 == 0
    assert account(run).flops_per_token == pytest.approx(
        0.98 * account(base).flops_per_token, rel=1e-3)


def test_a_matched_baseline_costs_what_the_memory_costs():
    run = recipe("tiny")
    bare = matched_baseline(run)
    assert bare.model.engram is None
    assert bare.model.ffn > run.model.ffn
    assert account(bare).flops_per_token == pytest.approx(account(run).flops_per_token, rel=1e-3)


def test_rows_fill_the_parameters_that_are_asked_for():
    run = recipe("tiny")
    for wanted in (1_000_000, 2_345_678, 9_000_000):
        made = with_parameters(run, wanted)
        assert countable(made) == pytest.approx(wanted, abs=3 * 8 * 16 * 20)
    with pytest.raises(UserError, match=r"rows_per_head = -?\d+: is what tiny has room for"):
        with_parameters(run, 100_000)


def test_the_dry_run_says_targets_and_what_is_met():
    lines = described("paper").splitlines()
    assert len(lines) == 1 + 2 * len(RHOS)
    first = lines[1].split()
    assert first[:4] == ["moe-6b", "0.4", "0.4000", "46"]
    assert all(abs(float(line.split()[6].rstrip("%"))) <= 0.1 for line in lines[1:])
    assert all(abs(float(line.split()[9].rstrip("%"))) <= 1 for line in lines[1:])


def test_many_experts_or_few():
    base, memory = SCALES["tiny"][1]
    few = changed(base, {"model.moe": MoEConfig(experts=8, top_k=2, shared=1, expert_ffn=64)})
    point = allocate(few, 0.5, memory)
    assert point.run.model.moe.experts == 5
    assert abs(point.parameters_off) < 1e-3
