"""A trained run that is split over devices generates and is looked into as on one."""

import functools
import re

import jax
import numpy as np
import pytest
from micro import micro, write_text

from engram_jax.cli import main
from engram_jax.costs.hlo import bytes_of, parse
from engram_jax.errors import UserError
from engram_jax.evaluation.scoring import Scorer
from engram_jax.hashing.addressing import address
from engram_jax.inference.device_rows import DeviceRows
from engram_jax.inference.engine import Engine, Request
from engram_jax.inference.serving import engine, served
from engram_jax.insides import analyses
from engram_jax.report import findings
from engram_jax.runs.directory import RunDirectory
from engram_jax.training import placement
from engram_jax.training.state import init_state

pytestmark = pytest.mark.usefixtures("compilations")

REQUESTS = [Request(prompt=(5, 6, 7, 8, 9), tokens=6),
            Request(prompt=(40, 41), tokens=4, temperature=1.0, seed=3)]


def bytes_here(tree):
    """What the first device has of the arrays, and what there is of them in all."""
    leaves = jax.tree.leaves(tree)
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return here, sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("memory", [
    "device", pytest.param("host", marks=pytest.mark.slow)])
def test_the_same_text(trained, memory):
    texts = {}
    for mesh in ("1x1", "2x2"):
        with engine(trained, memory, mesh=mesh, slots=2, length=16) as running:
            texts[mesh] = running.generate(REQUESTS)
    assert texts["2x2"] == texts["1x1"]


def test_tasks_have_the_same_scores(trained):
    tokens_BT = np.arange(24, dtype=np.int32).reshape(3, 8) + 5
    scores = []
    for mesh in ("1x1", "2x2"):
        model = served(RunDirectory(trained), mesh=mesh)
        scores.append(Scorer(model, batch_size=2)(tokens_BT, tokens_BT + 1))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
                 *scores)


def test_each_device_has_its_part(trained):
    model = served(RunDirectory(trained), mesh="1x4")
    here, whole = bytes_here(model.params)
    assert whole / 4 <= here < 0.3 * whole
    assert isinstance(model.rows, DeviceRows)
    here, whole = bytes_here(model.rows._tables)
    assert here == whole / 4


def test_no_table_travels(trained):
    """Rows come to where they are asked for; the table stays where it is."""
    model = served(RunDirectory(trained), mesh="1x4")
    [table] = model.rows._tables.values()
    program = model.rows._gather.lower(
        model.rows._tables, np.ones((1, 2), np.int32), None, None).compile()
    travelling = [site.instruction for site in parse(program.as_text()).walk()
                  if re.match("all-|reduce-scatter|collective", site.instruction.opcode)]
    assert travelling
    for instruction in travelling:
        assert sum(map(bytes_of, instruction.shapes)) < table.nbytes / 8


@pytest.mark.slow
def test_experts_and_streams_on_a_mesh(tmp_path):
    run = micro(write_text(tmp_path / "text.txt"))
    addressing, texts = address(run.model, None, 0), []
    for mesh in (placement.single_mesh(), placement.make_mesh(1, 2, expert=2)):
        state = jax.jit(functools.partial(init_state, run), out_shardings=placement.shardings(
            run, mesh))(np.int32(0))
        with Engine(run.model, state.params, state.router_bias,
                    DeviceRows(run.model, addressing, state.tables), pad_id=0, slots=2,
                    length=16) as running:
            texts.append(running.generate(REQUESTS))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("what", [
    pytest.param("gates", marks=pytest.mark.slow), "suppression"])
def test_the_same_findings(trained, what):
    alone, split = (analyses.analyze(what, [trained], mesh=mesh) for mesh in ("1x1", "1x4"))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4)
                 if isinstance(one, float) else None, alone, split)
    assert jax.tree.structure(alone) == jax.tree.structure(split)


def test_a_report_opens_its_runs_on_the_mesh(trained):
    [subject] = findings.material([trained], mesh="1x4").subjects
    assert subject.opened is not None
    here, whole = bytes_here(subject.opened.state.tables)
    assert here == whole / 4
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(
        subject.opened.state.opt_state)), "only what is read is restored"


def test_one_device_unless_a_mesh_is_named(trained, monkeypatch):
    run = RunDirectory(trained).config()
    assert placement.serving_mesh(run).size == 1
    monkeypatch.setenv("ENGRAM_MESH", "1x4")
    assert placement.serving_mesh(run).size == 4
    assert placement.serving_mesh(run, "1x2").size == 2


@pytest.mark.slow
def test_the_command(trained, capsys):
    texts = []
    for words in ([], ["--mesh", "2x2"]):
        assert main.main(
            ["generate", str(trained), "--prompt", "the", "--tokens", "5", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_mesh_that_does_not_divide_the_tables(trained, capsys):
    assert main.main(["generate", str(trained), "--prompt", "the", "--mesh", "1x8"]) == 2
    line = capsys.readouterr().err
    assert line == ("engram-jax: mesh = '1x8': has 8 devices, which must divide the 4 shards of "
                    "the run's table layer_0\n")
    served(RunDirectory(trained), "host", mesh="1x8").rows.close()
    with pytest.raises(UserError, match="mesh = '3': write it as DATAxFSDP"):
        served(RunDirectory(trained), mesh="3")
