"""docs/metrics.md has every key that a run writes, and no other."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from micro import micro, write_text

from engram_jax.config import OverEncodingConfig
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import open_inputs
from engram_jax.settings import changed
from engram_jax.training.state import abstract_state
from engram_jax.training.step import train_step

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def keys(heading):
    """The first column of the table under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `?([^`|]+?)`? \|", section, re.MULTILINE)[1:]


def test_every_key_stands_once():
    for heading in ("metrics.jsonl", "result.json and results.csv", "Glossary"):
        assert len(keys(heading)) == len(set(keys(heading))) > 10


def test_the_glossary_is_in_order():
    words = keys("Glossary")
    assert words == sorted(words)


@pytest.fixture(scope="module")
def of_a_step(tmp_path_factory):
    """What the step of a run with experts and a memory says; it is traced and not compiled."""
    run = micro(write_text(tmp_path_factory.mktemp("page") / "text.txt"), check_exchange=True)
    shape = (run.data.batch_size, run.data.sequence_length)
    batch = {"tokens_BT": jax.ShapeDtypeStruct(shape, jnp.int32),
             "targets_BT": jax.ShapeDtypeStruct(shape, jnp.int32),
             "starts_BT": jax.ShapeDtypeStruct(shape, jnp.bool_)}

    def said(run):
        step = train_step(run, open_inputs(run).addressing)
        return set(jax.eval_shape(step, abstract_state(run), batch)[1])

    over = OverEncodingConfig(rows_per_head=(64, 64), heads=2, shards=4)
    return said(run) | said(changed(run, {"model.engram": None, "model.over_encoding": over}))


def test_metrics(trained, of_a_step):
    logged = set().union(*RunDirectory(trained).metrics())
    assert logged - {"step"} <= set(keys("metrics.jsonl"))
    assert logged | of_a_step == set(keys("metrics.jsonl"))


def test_result(trained):
    assert set(RunDirectory(trained).result()) == set(keys("result.json and results.csv"))
