"""What a run costs, against the published numbers and against counting by hand."""

import json

import jax
import pytest

from engram_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from engram_jax.costs.accounting import account, described
from engram_jax.hashing.addressing import sites
from engram_jax.model import transformer
from engram_jax.recipes import RECIPES, recipe, with_over_encoding, without_memory
from engram_jax.settings import changed, with_settings

B = 1e9


# docs/spec.md section 3.1 (Engram paper table 5, mHC paper table 5): total, active, Engram.
@pytest.mark.parametrize(("name", "total", "active", "engram"), [
    ("dense-4b", 4.133, 3.802, 0),
    ("moe-27b", 26.717, 3.808, 0),
    ("engram-27b", 26.7, 3.8, 5.792),
    ("engram-40b", 39.5, 3.8, 18.53),
])
def test_published_sizes(name, total, active, engram):
    numbers = account(recipe(name))
    for value, published in ((numbers.total_params, total), (numbers.active_params, active),
                             (numbers.engram_params, engram)):
        last_digit = 10.0 ** -len(str(published).partition(".")[2])
        assert value / B == pytest.approx(published, abs=0.6 * last_digit)


def test_published_budget_and_allocation():
    moe, engram = account(recipe("moe-27b")), account(recipe("engram-27b"))
    assert round((moe.active_params + moe.sparse_params) / B, 3) == 26.386
    assert round(moe.sparse_params / B, 3) == 22.578
    assert moe.rho == 1
    assert round(engram.rho, 4) == 0.7435
    assert engram.rho_of == "moe-27b"
    assert account(recipe("dense-4b")).rho is None


def test_a_model_of_another_size_is_measured_on_its_own_tree():
    run = recipe("engram-27b")
    bigger = with_settings(run, ["model.engram.rows_per_head=[7239680,7239680]"])
    numbers = account(bigger)
    assert numbers.rho_of == bigger.name
    assert numbers.rho == 1 - numbers.engram_params / numbers.sparse_params
    assert numbers.rho == account(recipe("engram-40b")).rho


def test_more_experts_move_rho_up():
    """rho = (E - 6) / (E_1 - 6) where only the number of experts changes."""
    run = recipe("engram-27b")
    expected = (run.model.moe.experts - 6) / (72 - 6)
    assert account(run).rho == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_parts_add_up(name):
    run = recipe(name)
    numbers = account(run)
    inside = {kind: part for kind, part in numbers.parts.items() if kind != "token embedding"}
    assert sum(part.total for part in inside.values()) == numbers.total_params
    inside.pop("LM head")
    assert sum(part.active for part in inside.values()) == numbers.active_params
    assert sum(part.total - part.active for part in inside.values()) == numbers.sparse_params
    tables = sum(p.total for kind, p in inside.items() if kind.startswith("table "))
    assert tables == numbers.engram_params
    tree = jax.eval_shape(lambda: transformer.init(run.model, jax.random.key(0)))
    leaves = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert leaves + tables == numbers.total_params + numbers.parts["token embedding"].total


@pytest.mark.parametrize("name", RECIPES)
def test_json_fields(name):
    values = json.loads(json.dumps(account(recipe(name)).to_dict()))
    assert {"total_params", "active_params", "sparse_params", "engram_params", "rho",
            "flops_per_token", "table_bytes_per_token"} <= set(values)


@pytest.mark.parametrize("name", RECIPES)
def test_described_names_every_part(name):
    run = recipe(name)
    text = described(run)
    assert all(kind in text for kind in account(run).parts)
    assert max(map(len, text.splitlines())) <= 100


def test_tied_head_is_counted_once_as_the_head():
    run = recipe("tiny")
    tied = changed(run, {"model.tied_head": True})
    untied_numbers, numbers = account(run), account(tied)
    assert "LM head" not in numbers.parts
    for field in ("total_params", "active_params", "sparse_params", "rho", "flops_per_token"):
        assert getattr(numbers, field) == getattr(untied_numbers, field)


def test_tables_are_counted_by_their_rows_and_not_by_their_padding():
    run = recipe("tiny")
    engram = run.model.engram
    (site,) = sites(run.model)
    numbers = account(run)
    assert numbers.engram_params == site.rows * engram.head_dim
    primes = 16_384 * engram.total_heads
    assert primes <= site.rows < primes * 1.01
    assert numbers.table_bytes_per_token == 4 * engram.memory_dim


def test_over_encoding_is_a_memory_of_the_same_rows():
    run = recipe("tiny")
    over = account(with_over_encoding(run))
    heads = run.model.engram.total_heads
    assert over.engram_params == (
        account(run).engram_params // run.model.engram.head_dim * (run.model.width // heads))
    assert over.table_bytes_per_token == 4 * run.model.width
    assert over.parts["over-encoding projections"].total == run.model.width**2
    assert account(without_memory(run)).engram_params == 0
    assert account(without_memory(run)).rho == 1


def dense():
    attention = AttentionConfig(heads=2, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=10)
    return RunConfig(
        name="dense",
        model=ModelConfig(vocab_size=64, width=32, depth=3, ffn=48, attention=attention),
        data=DataConfig(sequence_length=15, batch_size=2),
        optimizer=OptimizerConfig(), training=TrainingConfig(steps=1))


def test_flops_of_a_dense_model_by_hand():
    """6 for each weight that a token meets, and attention over 8 = (15 + 1) / 2 positions."""
    attention = 32 * 2 * 12 + 32 * (16 + 4) + 16 + 16 * 2 * (8 + 10) + 2 * 10 * 32
    block = attention + 3 * 32 * 48 + 2 * 32
    weights = 3 * block + 32 + 32 * 64
    scores_and_mixing = 3 * 2 * (2 * (8 + 4) + 2 * 10) * 8
    numbers = account(dense())
    assert numbers.total_params == weights
    assert numbers.active_params == weights - 32 * 64
    assert numbers.flops_per_token == 6 * weights + 3 * scores_and_mixing
    assert numbers.sparse_params == 0
    assert numbers.rho is None
    assert numbers.table_bytes_per_token == 0


def test_rows_cost_no_flops_and_idle_experts_neither():
    run = recipe("tiny")
    more_rows = with_settings(run, ["model.engram.rows_per_head=[50000,50000]"])
    assert account(more_rows).flops_per_token == account(run).flops_per_token
    assert account(more_rows).active_params == account(run).active_params
    fusion = account(run).parts["engram fusion"].total
    assert account(run).flops_per_token == (
        account(without_memory(run)).flops_per_token + 6 * fusion)
    more_experts = with_settings(run, ["model.moe.experts=16"])
    router = 2 * 8 * run.model.width  # of two blocks
    assert account(more_experts).active_params == account(run).active_params + router
