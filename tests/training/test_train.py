"""The train step, its optimizers, the loop that can be killed anywhere, and its checkpoints.

`ENGRAM_WRITE_GOLDEN=1 pytest tests/training -k golden` writes golden/train_step.json anew.
"""

import dataclasses
import gc
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import string
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from micro import STEPS, micro, plain, with_data, with_model, with_training, write_text

from engram_jax.config import OptimizerConfig, OverEncodingConfig
from engram_jax.data.batches import train_batches, validation_batches
from engram_jax.errors import MachineError, UserError
from engram_jax.model import parameters, transformer
from engram_jax.model.parameters import Parameter
from engram_jax.recipes import RECIPES, tiny, without_memory
from engram_jax.runs import evaluate, train
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.evaluate import evaluator
from engram_jax.runs.reader import open_inputs
from engram_jax.settings import changed, first_difference, to_dict
from engram_jax.tables.layout import gather_rows
from engram_jax.tables.local import LocalMemory
from engram_jax.training import step
from engram_jax.training.optimizers import optimizer, schedule
from engram_jax.training.placement import placed_state, single_mesh
from engram_jax.training.state import init_state

pytestmark = pytest.mark.usefixtures("compilations")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "train_step.json"
TINY = GOLDEN.with_name("tiny_losses.json")
TENSORBOARD = importlib.util.find_spec("tensorboardX") is not None


def silent(line):
    del line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Tables are row Adam's: its moments show what a step has asked for."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return changed(micro(text, evaluate_every=5), {"optimizer.table_optimizer": "row_adam"})


@pytest.fixture(scope="module")
def inputs(run):
    return open_inputs(run)


@pytest.fixture(scope="module")
def first(run):
    """The state before the first step."""
    return jax.jit(lambda: init_state(run))()


@pytest.fixture(scope="module")
def donated(run, inputs):
    return jax.jit(step.train_step(run, inputs.addressing), donate_argnums=0)


@pytest.fixture(scope="module")
def take(donated):
    """A step that leaves its state as it was."""
    return lambda state, batch: donated(jax.tree.map(jnp.copy, state), batch)


@pytest.fixture(scope="module")
def batch(run):
    return synthetic(run, 0)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The records of the run, trained in one go."""
    place = tmp_path_factory.mktemp("whole") / "run"
    train.train(with_training(run, tensorboard=TENSORBOARD), place, silent)
    return RunDirectory(place)


@pytest.fixture(scope="module")
def last(run, inputs, whole):
    """The state at the end of `whole`."""
    return restored(run, inputs, whole.checkpoints)


def synthetic(run, seed):
    """A batch of made-up tokens in which n-grams repeat."""
    shape = run.data.batch_size, run.data.sequence_length
    draw = np.random.default_rng(seed)
    tokens_BT, targets_BT = draw.integers(2, 40, (2, *shape)).astype(np.int32)
    tokens_BT[1] = tokens_BT[0]
    return {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "starts_BT": np.zeros(shape, bool)}


def restored(run, inputs, place, at=None):
    with Checkpoints(epath.Path(place), 2, inputs.fingerprints()) as checkpoints:
        return checkpoints.restore(placed_state(run, single_mesh()), step=at)


def leaves(tree):
    return {jax.tree_util.keystr(path): np.array(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(tree, other):
    ours, theirs = leaves(tree), leaves(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(
            ours[name].view(np.uint8) if ours[name].ndim else ours[name],
            theirs[name].view(np.uint8) if theirs[name].ndim else theirs[name], err_msg=name)


def curve(records):
    """metrics.jsonl without what the clock says."""
    return [{name: value for name, value in row.items() if not name.startswith("perf/")}
            for row in records.metrics()]


def outcome(records):
    return {name: value for name, value in records.result().items() if name != "tokens_per_s"}


# --- The step ---


def test_golden_train_step(run, first, take):
    state, found = first, {"loss": [], "grad_norm": []}
    for number in range(4):
        state, metrics = take(state, synthetic(run, number))
        for name, values in found.items():
            values.append(float(metrics[f"learning/{name}"]))
    if os.environ.get("ENGRAM_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for name, values in found.items():
        np.testing.assert_allclose(values, golden[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_tiny_has_the_losses_of_before_the_step_was_made_fast(tmp_path):
    """Of twenty steps, by an earlier commit; to the bit where CPUs and versions are the same."""
    random = np.random.default_rng(20)
    words = ["".join(random.choice(list(string.ascii_lowercase), random.integers(2, 9)))
             for _ in range(600)]
    share = 1 / np.arange(1, 601)
    text = " ".join(words[each] for each in random.choice(600, 60_000, p=share / share.sum()))
    (tmp_path / "text.txt").write_text(text)
    run = changed(tiny(), {
        "data.path": str(tmp_path / "text.txt"), "data.tokenizer": "bpe:1024",
        "data.batch_size": 2, "model.vocab_size": 1024, "training.steps": 20,
        "training.log_every": 1, "training.checkpoint_every": 0,
        "optimizer.table_optimizer": "row_adam"})
    result = train.train(run, tmp_path / "run", silent, single_mesh())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    losses = [line["learning/loss"] for line in logged if "learning/loss" in line]
    wanted = json.loads(TINY.read_text())
    np.testing.assert_allclose(losses, wanted["losses"], rtol=0, atol=1e-6)
    assert result["loss"] == pytest.approx(wanted["validation_loss"], abs=1e-6)


def dense_gradients(run, inputs, state, batch):
    """Gradients of parameters and of whole tables, by differentiating through the reads."""

    def loss(params, tables):
        rows = gather_rows(run.model, tables, step.row_ids(run, inputs.addressing, batch))
        return step.mean_loss(params, rows, state.router_bias, batch, run)[0]

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(state.params, state.tables)


def test_clipping_counts_the_table_gradient_once(run, inputs, first, take, batch):
    grads, table_grads = dense_gradients(run, inputs, first, batch)
    norm = float(optax.tree.norm((grads, table_grads)))
    state, metrics = take(first, batch)
    assert float(metrics["learning/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert norm > run.optimizer.clip_norm, "the batch should be clipped"
    for name, grad_SRD in table_grads.items():
        m_SRD = (1 - run.optimizer.table_b1) * grad_SRD * (run.optimizer.clip_norm / norm)
        np.testing.assert_allclose(state.table_state[name].m_SRD, m_SRD, rtol=1e-4, atol=1e-7)


def test_a_step_moves_exactly_the_rows_that_were_read(run, inputs, first, take, batch):
    state, metrics = take(first, batch)
    touched = asked = 0
    for name, ids_BTH in step.row_ids(run, inputs.addressing, batch).items():
        before, after = np.array(first.tables[name]), np.array(state.tables[name])
        rows, shards = np.unique(np.array(ids_BTH)), before.shape[0]
        moved_SR = (before != after).any(-1)
        expected_SR = np.zeros_like(moved_SR)
        expected_SR[rows % shards, rows // shards] = True
        np.testing.assert_array_equal(moved_SR, expected_SR)
        np.testing.assert_array_equal(state.table_state[name].touched_SR == 1, expected_SR)
        touched, asked = touched + rows.size, asked + ids_BTH.size
    assert float(metrics["engram/rows_touched"]) == touched
    assert float(metrics["engram/unique_share"]) == pytest.approx(touched / asked)
    assert touched < asked, "the batch should ask for some rows twice"


def test_a_gradient_that_is_not_finite_changes_the_step_alone(first, take, batch):
    bad = first.replace(params={
        **first.params, "final_gain": first.params["final_gain"].at[3].set(jnp.nan)})
    state, metrics = take(bad, batch)
    assert float(metrics["learning/skipped"]) == 1
    assert int(state.step) == 1
    assert_same_bits(state.replace(step=bad.step), bad)


def test_the_rate_is_that_of_the_steps_number(run, first, take, batch):
    """Also after skipped steps, which the optimizer's own state does not count."""
    rate = schedule(run.optimizer, run.training.steps)
    moves = []
    for number in (0, 2):
        state, _ = take(first.replace(step=jnp.int32(number)), batch)
        moved = np.array(state.params["final_gain"]) - np.array(first.params["final_gain"])
        moves.append(np.abs(moved).mean() / float(rate(number)))
    assert float(rate(0)) != float(rate(2))
    assert moves[0] == pytest.approx(moves[1], rel=1e-3)


def test_skipped_steps_are_not_in_the_bias_correction_of_tables(run, first, take, batch):
    """The first update after two skipped steps moves rows as the first of all does, as optax's."""
    rate = schedule(run.optimizer, run.training.steps)
    moves = {}
    for number in (0, 2):
        state, _ = take(first.replace(step=jnp.int32(number)), batch)
        for name, table in state.tables.items():
            moved = (np.array(table) - np.array(first.tables[name])) / float(rate(number))
            moves.setdefault(name, []).append(moved / run.optimizer.table_multiplier)
    for of_first, after_skips in moves.values():
        np.testing.assert_allclose(of_first, after_skips, rtol=1e-3, atol=1e-5)
        assert np.abs(after_skips).max() == pytest.approx(1, rel=1e-3), "Adam's first is the sign"


def test_a_run_stops_where_rows_do_not_reach_their_owners(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalMemory, "agrees", lambda self, routes: {
        name: jnp.bool_(False) for name in routes})
    checked = plain(micro(write_text(tmp_path / "text.txt"), check_exchange=True))
    with pytest.raises(MachineError, match=r"^step 1: rows of 1 tables did not reach the devices"):
        train.train(checked, tmp_path / "run", silent)
    assert not (tmp_path / "run" / "result.json").exists()


def test_good_steps_change_every_parameter(first, take, batch):
    state, metrics = take(first, batch)
    assert float(metrics["learning/skipped"]) == 0
    state, _ = take(state, batch)  # at the start the convolution's zeros hide its gain
    before, after = leaves(first.params), leaves(state.params)
    same = [name for name in before if (before[name] == after[name]).all()]
    assert same == []


def test_router_biases_move_against_the_load(run, first, take, batch):
    state, _ = take(first, batch)
    rate = run.model.moe.balance_rate
    for bias_LE in state.router_bias:
        moved = np.array(bias_LE) / rate
        np.testing.assert_allclose(np.abs(moved), np.round(np.abs(moved)), atol=1e-6)
        assert (moved > 0).any(axis=1).all(), "some expert is asked for too little"
        assert (moved < 0).any(axis=1).all(), "some expert is asked for too much"


def test_metrics_have_their_names(first, take, batch):
    _, metrics = take(first, batch)
    assert {"learning/loss", "learning/grad_norm", "learning/current_learning_rate",
            "engram/gate_mean", "engram/rows_touched", "engram/unique_share"} <= set(metrics)
    assert 0 < float(metrics["engram/gate_mean"]) < 1
    assert float(metrics["learning/loss"]) == pytest.approx(math.log(300), rel=0.15)


# --- Optimizers ---

LABELS = {
    "embedding": {"embedding", "head"},
    "vector": {"final_gain", "attention_gain", "ffn_gain", "latent_gain", "query_gain",
               "key_gain", "conv_gain", "conv", "bias", "scale"},
}


def every_model():
    for name, build in RECIPES.items():
        yield name, build().model
    tiny = RECIPES["tiny"]().model
    over = OverEncodingConfig(rows_per_head=(64, 64), heads=4)
    biased = dataclasses.replace(tiny.engram, bias=True)
    yield "over", dataclasses.replace(tiny, engram=None, over_encoding=over)
    yield "biased", dataclasses.replace(tiny, engram=biased, tied_head=True, streams=4)


@pytest.mark.parametrize(("name", "model"), list(every_model()), ids=lambda value: str(value)[:12])
def test_every_parameter_has_its_optimizer(name, model):
    flat = jax.tree_util.tree_leaves_with_path(
        transformer.declared(model), is_leaf=parameters.is_parameter)
    for path, parameter in flat:
        keys, leaf = [getattr(key, "key", None) for key in path], parameter.value
        expected = next((k for k, names in LABELS.items() if keys[-1] in names), "matrix")
        assert parameter.trained == expected, f"{name}: {keys}"
        assert parameter.split == (expected != "vector" and keys[-1] != "router"), keys
        assert parameter.cast == (parameter.split or keys[-1] == "conv"), keys
        assert parameter.part in parameters.PARTS, keys
        own_axes = leaf.ndim - ("blocks" in keys)
        if parameter.trained == "matrix":
            assert own_axes >= 2, f"{name}: {keys} is a vector"
            assert min(leaf.shape[-2:]) > 1
        elif parameter.trained == "vector":
            assert own_axes == 1 or keys[-2] == "engram", f"{name}: {keys} is a matrix"


def update_of(grads, **settings):
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, **settings)
    declared = {name: Parameter(leaf, next(
        (k for k, names in LABELS.items() if name in names), "matrix"), split=False, cast=False)
        for name, leaf in grads.items()}
    transform = optimizer(config, declared)
    params = jax.tree.map(jnp.ones_like, grads)
    updates = jax.jit(lambda g: transform.update(g, transform.init(params), params)[0])(grads)
    return jax.tree.map(lambda update: config.learning_rate * update, updates)


def test_muon_orthogonalises_each_matrix_of_each_expert_and_layer():
    grad_LEDF = jax.random.normal(jax.random.key(0), (2, 3, 8, 24))
    grad_LEDF = grad_LEDF * jnp.array([[1e-3, 1, 50], [2, 1e3, 0.1]])[:, :, None, None]
    update_LEDF = np.array(update_of({"gate": grad_LEDF}, weight_decay=0.0)["gate"])
    for layer in range(2):
        for expert in range(3):
            u, _, v = np.linalg.svd(np.array(grad_LEDF[layer, expert]), full_matrices=False)
            update = -update_LEDF[layer, expert] / 1e-2
            assert np.sqrt(np.mean(update**2)) == pytest.approx(0.18, rel=0.2)
            cosine = np.sum(update * (u @ v)) / np.linalg.norm(update) / np.linalg.norm(u @ v)
            assert cosine > 0.95
            singular = np.linalg.svd(update, compute_uv=False)
            assert singular.max() / singular.min() < 2.5


def test_weight_decay_is_for_matrices_and_embeddings():
    grads = {"gate": jnp.zeros((4, 6)), "embedding": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}
    updates = update_of(grads, weight_decay=0.5)
    np.testing.assert_allclose(updates["gate"], np.full((4, 6), -0.005), rtol=1e-5)
    np.testing.assert_allclose(updates["embedding"], np.full((4, 6), -0.005), rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], np.zeros(6))


def test_schedule_warms_up_and_decays_in_steps():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10)
    rate = schedule(config, 100)
    expected = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 79: 2.0, 80: 0.632, 89: 0.632, 90: 0.2, 99: 0.2}
    for number, value in expected.items():
        assert float(rate(jnp.int32(number))) == pytest.approx(value, rel=1e-5), number
    no_warmup = schedule(dataclasses.replace(config, warmup_steps=0), 100)
    assert float(no_warmup(jnp.int32(0))) == 2.0


@pytest.mark.parametrize("changes", [
    {"warmup_steps": 2000},
    {"warmup_steps": 430, "decay_at": (0.1, 0.7), "decay_to": (0.9, 0.0)},
    {"warmup_steps": 450},
    {"warmup_steps": 357, "decay_at": (0.7000001, 0.9)},
    {"schedule": "wsd", "warmup_steps": 2000},
    {"schedule": "wsd", "warmup_steps": 10, "decay_share": 1.0, "decay_floor": 0.1},
    {"schedule": "wsd", "warmup_steps": 0, "decay_share": 0.3},
])
@pytest.mark.parametrize("steps", [500, 7, 1])
def test_the_rate_never_rises_again(changes, steps):
    config = OptimizerConfig(**{"learning_rate": 1.0, **changes})
    rates = np.asarray(jax.vmap(schedule(config, steps))(jnp.arange(steps)))
    assert (rates >= 0).all()
    assert rates[0] > 0
    shares = config.decay_at if config.schedule == "step" else (1 - config.decay_share,)
    begin = math.ceil(shares[0] * steps)
    assert (np.diff(rates[max(0, begin - 1):]) <= 0).all(), rates
    assert (np.diff(rates[:begin]) >= 0).all(), rates


def test_a_schedule_that_is_constant_and_then_falls():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="wsd", decay_share=0.2,
                             decay_floor=0.1)
    rates = np.asarray(jax.vmap(schedule(config, 100))(jnp.arange(100)))
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2, rtol=1e-5)
    np.testing.assert_array_equal(rates[10:80], np.full(70, 2.0))
    np.testing.assert_allclose(rates[80:], 2.0 * (1 - 0.9 * np.arange(1, 21) / 20), rtol=1e-5)
    longer = np.asarray(jax.vmap(schedule(config, 200))(jnp.arange(80)))
    np.testing.assert_array_equal(longer, rates[:80])  # so a run may be extended before it falls


# --- A run and its records ---


def test_a_run_leaves_its_records(run, whole):
    assert to_dict(whole.config()) == to_dict(with_training(run, tensorboard=TENSORBOARD))
    env = json.loads((whole.path / "env.json").read_text())
    assert {"git", "packages", "devices", "data_fingerprint", "tokenizer_digest"} <= set(env)
    rows = [row for row in whole.metrics() if "learning/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {"perf/step_time_seconds", "perf/per_device_tokens_per_sec", "engram/gate_mean"}
    assert all(names <= set(row) for row in rows)
    assert [row["step"] for row in whole.metrics() if "evaluation/loss" in row] == [5, STEPS]
    result = whole.result()
    assert result["loss"] < rows[0]["learning/loss"]
    assert result["tokens_per_s"] > 0
    assert result["slots"] == 64
    assert result["tokens"] == STEPS * 64


def test_only_the_last_checkpoints_are_kept(whole):
    assert sorted(path.name for path in whole.checkpoints.iterdir()) == ["6", "7"]


@pytest.mark.skipif(not TENSORBOARD, reason="needs tensorboardX")
def test_tensorboard_events_are_written(whole):
    events = list((whole.path / "tensorboard").iterdir())
    assert events
    assert b"learning/loss" in events[0].read_bytes()


def test_a_finished_run_is_not_run_again(run, whole, monkeypatch):
    monkeypatch.setattr(train, "open_inputs", None)
    again = with_training(run, tensorboard=TENSORBOARD)
    assert train.train(again, whole.path, silent) == whole.result()
    with pytest.raises(UserError, match=r"optimizer.learning_rate = 0.5.*holds a run with 0.01"):
        train.train(changed(again, {"optimizer.learning_rate": 0.5}), whole.path, silent)


class Stop(Exception):
    """Stands for a kill."""


def stop_after_step(monkeypatch, number):
    log = train._Loop._log

    def stopping(self, at, metrics):
        log(self, at, metrics)
        if at == number:
            raise Stop

    monkeypatch.setattr(train._Loop, "_log", stopping)


def stop_after_checkpoint(monkeypatch, number):
    save = Checkpoints.save

    def stopping(self, at, state, batches):
        save(self, at, state, batches)
        if at == number:
            self.wait()
            raise Stop

    monkeypatch.setattr(Checkpoints, "save", stopping)


STOPS = {
    "before any checkpoint": (stop_after_step, 2, 0),
    "as soon as a checkpoint is whole": (stop_after_checkpoint, 3, 3),
    "after an evaluation": (stop_after_step, 6, 3),
    "before result.json": (stop_after_checkpoint, STEPS, STEPS),
}


@pytest.mark.parametrize("stop", [
    pytest.param(stop, marks=() if stop == "after an evaluation" else pytest.mark.slow)
    for stop in STOPS])
def test_stopped_and_started_again_gives_the_same_bits(
    run, inputs, whole, last, tmp_path, monkeypatch, stop
):
    at, number, start = STOPS[stop]
    with monkeypatch.context() as patch:
        at(patch, number)
        with pytest.raises(Stop):
            train.train(run, tmp_path, silent)
    assert not (tmp_path / "result.json").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "learning/lo')  # a line that was cut off
    said = []
    train.train(run, tmp_path, said.append)
    assert any(f"going on from step {start}" in line for line in said) == (start > 0)
    records = RunDirectory(tmp_path)
    assert sorted(map(str, curve(records))) == sorted(map(str, curve(whole)))
    assert outcome(records) == outcome(whole)
    assert records.result()["tokens_per_s"] > 0
    assert_same_bits(restored(run, inputs, records.checkpoints), last)


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bits(
    run, inputs, whole, last, tmp_path, compilations
):
    program = (
        "import sys, json; from engram_jax.settings import from_dict; "
        "from engram_jax.runs.train import train; "
        "train(from_dict(json.load(open(sys.argv[1]))), sys.argv[2])")
    (tmp_path / "config").write_text(json.dumps(to_dict(run)))
    place = tmp_path / "run"
    command = [sys.executable, "-c", program, str(tmp_path / "config"), str(place)]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compilations),
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
           "PYTHONPATH": str(pathlib.Path(train.__file__).parents[2])}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not (place / "checkpoints" / "3").exists():
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (place / "result.json").exists()
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    records = RunDirectory(place)
    assert sorted(map(str, curve(records))) == sorted(map(str, curve(whole)))
    assert outcome(records) == outcome(whole)
    assert_same_bits(restored(run, inputs, records.checkpoints), last)


def test_the_order_of_the_data_is_its_seeds(run, whole, tmp_path):
    other = with_training(with_data(run, seed=1), evaluate_every=0, checkpoint_every=0)
    train.train(other, tmp_path, silent)

    def losses(records):
        return [row["learning/loss"] for row in records.metrics() if "learning/loss" in row]

    found = losses(RunDirectory(tmp_path))
    assert len(found) == STEPS
    assert all(ours != theirs for ours, theirs in zip(found, losses(whole), strict=True))


def test_models_that_differ_in_memory_see_the_same_text_and_start_alike(run, inputs):
    bare = without_memory(run)
    batches = [train_batches(open_inputs(r).tokens, r.data) for r in (run, bare)]
    for ours, theirs, _ in zip(*batches, range(5), strict=False):
        assert_same_bits(ours, theirs)
    with_memory, without = (
        leaves(transformer.init(r.model, jax.random.key(3))) for r in (run, bare))
    assert set(with_memory) - set(without) == {
        name for name in with_memory if "engram" in name}
    assert_same_bits({name: with_memory[name] for name in without}, without)


def test_text_that_changed_is_not_gone_on_with(run, tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.txt", words=1500)
    mine = with_data(run, path=text)
    monkeypatch.setattr(train._Loop, "run_to_end", lambda self, *words: {})
    train.train(mine, tmp_path / "run", silent)
    write_text(tmp_path / "text.txt", words=1500, seed=1)
    with pytest.raises(UserError, match=r"data.path = .*no longer the text"):
        train.train(mine, tmp_path / "run", silent)


@pytest.mark.parametrize(("fields", "line"), [
    ({"batch_size": 4000}, r"data.batch_size = 4000: .*sequences"),
    ({"validation_fraction": 1e-7}, r"data.validation_fraction = 1e-07"),
])
def test_settings_that_the_data_refuses_leave_no_folder(run, tmp_path, fields, line):
    with pytest.raises(UserError, match=line):
        train.train(with_data(run, **fields), tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


def test_records_that_cannot_be_written_are_the_machines_fault(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MachineError, match=r"jsonl: could not be written \(Is a directory\)"):
        RunDirectory(tmp_path).log({"step": 1})


def test_first_difference_names_the_field():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert first_difference({"a": [1]}, {"a": [1]}) is None


# --- Evaluation ---


def test_evaluation_weighs_every_validation_token_once(run, inputs, last):
    data, length = inputs.tokens, run.data.sequence_length
    found = evaluator(run, inputs)(last)
    tokens = np.asarray(data.validation.read(0, data.validation_tokens))

    @jax.jit
    def logits(tokens_1T):
        batch = {"tokens_BT": tokens_1T}
        rows = gather_rows(run.model, last.tables, step.row_ids(run, inputs.addressing, batch))
        return transformer.apply(last.params, tokens_1T, rows, last.router_bias, run.model)[0]

    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start:start + length + 1]
        padded = np.zeros((1, length), np.int32)
        padded[0, :len(window) - 1] = window[:-1]
        log_TV = np.array(jax.nn.log_softmax(logits(padded)[0]), np.float64)
        for place, target in enumerate(window[1:]):
            total, count = total - log_TV[place, target], count + 1
    assert found.tokens == count == data.validation_tokens - 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    per_token = data.validation_bytes / data.validation_tokens
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / per_token, rel=1e-9)


def test_results_are_read_one_batch_behind(run, inputs, monkeypatch):
    """Never more than two batches are under way, and a device never waits for a result's reader."""
    begun, seen = [], []

    class Sum:
        def __init__(self):
            self.number = len(begun)

        def __float__(self):
            seen.append((self.number, len(begun)))
            return 1.0

    def step(state, batch):
        begun.append(batch)
        return Sum(), Sum()

    monkeypatch.setattr(evaluate, "evaluation_step", lambda *settings: step)
    monkeypatch.setattr(evaluate, "to_be_read", lambda state: state)
    monkeypatch.setattr(evaluate.jax, "jit", lambda function: function)
    evaluator(with_training(run, evaluate_batches=3), inputs)(None)
    assert seen == [(1, 2), (1, 2), (2, 3), (2, 3), (3, 3), (3, 3)]


def test_evaluation_reads_as_many_batches_as_it_is_told(run, inputs, last):
    batches = list(validation_batches(inputs.tokens, run.data))
    assert len(batches) > 2
    assert batches[-1]["weights_BT"].min() == 0, "the text should end within a batch"
    found = evaluator(with_training(run, evaluate_batches=2), inputs)(last)
    assert found.tokens == 2 * run.data.batch_size * run.data.sequence_length


# --- Checkpoints ---


def test_a_save_is_safe_while_its_state_is_donated(run, inputs, first, donated, batch, tmp_path):
    state = jax.tree.map(jnp.copy, first)
    batches = train_batches(inputs.tokens, run.data)
    next(batches)
    for _ in range(2):
        state, _ = donated(state, batch)
    at_save = jax.tree.map(np.array, state)
    with Checkpoints(epath.Path(tmp_path), 2, inputs.fingerprints()) as checkpoints:
        checkpoints.save(2, state, batches)
        second = next(batches)
        for _ in range(5):
            state, _ = donated(state, batch)
        jax.block_until_ready(state)
    place = train_batches(inputs.tokens, run.data)
    with Checkpoints(epath.Path(tmp_path), 2, inputs.fingerprints()) as checkpoints:
        assert_same_bits(checkpoints.restore(placed_state(run, single_mesh()), place), at_save)
    assert_same_bits(next(place), second)


@pytest.fixture
def copied(whole, tmp_path):
    """Checkpoints of `whole` that a test may spoil."""
    shutil.copytree(whole.checkpoints, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_no_checkpoint(run, inputs, tmp_path):
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        restored(run, inputs, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer", "layer_0"])
def test_another_tokenizer_or_hash_is_refused(run, inputs, whole, name):
    prints = {**inputs.fingerprints(), name: "0123456789abcdef"}
    with (Checkpoints(whole.checkpoints, 2, prints) as checkpoints,
          pytest.raises(UserError, match="another tokenizer or hash") as error):
        checkpoints.restore(placed_state(run, single_mesh()))
    assert "01234567" in one_line(error)


def test_the_fingerprint_is_of_hash_and_tokenizer(run, inputs, tmp_path):
    assert set(inputs.fingerprints()) == {"tokenizer", "vocabulary", "layer_0"}
    seeded = changed(run, {"model.engram.hash_seed": 1})
    assert open_inputs(seeded).fingerprints()["layer_0"] != inputs.fingerprints()["layer_0"]
    other = with_data(run, path=write_text(tmp_path / "other.txt", seed=5))
    assert open_inputs(other).fingerprints()["tokenizer"] != inputs.fingerprints()["tokenizer"]


@pytest.mark.parametrize("fields", [{"width": 48}, {"depth": 3}, {"engram": None}, {"streams": 1}])
def test_other_shapes_are_refused(run, inputs, whole, fields):
    other = with_model(run, **fields)
    with pytest.raises(UserError, match="the model wants") as error:
        restored(other, inputs, whole.checkpoints)
    assert "7: " in one_line(error)


# Readers that orbax leaves behind find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spoil", ["truncated", "garbage", "no metadata"])
def test_a_spoiled_checkpoint_is_the_machines_fault(run, inputs, copied, last, spoil):
    state = copied / "7" / "state"
    if spoil == "no metadata":
        (state / "_METADATA").unlink()
    for file in [*state.glob("d/*"), *state.glob("ocdbt.process_0/d/*")]:
        data = file.read_bytes()
        if spoil == "truncated":
            file.write_bytes(data[:len(data) // 2])
        elif spoil == "garbage":
            file.write_bytes(bytes(len(data)))
    with pytest.raises(MachineError, match="cannot be read") as error:
        restored(run, inputs, copied)
    assert str(copied / "7") in one_line(error)
    assert int(restored(run, inputs, copied, at=6).step) == 6
    time.sleep(0.5)
    gc.collect()


@pytest.mark.parametrize("half", ["temporary folder", "no metadata", "empty"])
def test_a_half_written_checkpoint_is_passed_over(run, inputs, copied, last, half):
    name = "8.orbax-checkpoint-tmp" if half == "temporary folder" else "8"
    shutil.copytree(copied / "7", copied / name)
    if half == "no metadata":
        (copied / "8" / "_CHECKPOINT_METADATA").unlink()
        (copied / "8" / "commit_success.txt").unlink()
    if half == "empty":
        shutil.rmtree(copied / "8")
        (copied / "8").mkdir()
    assert_same_bits(restored(run, inputs, copied), last)
    with Checkpoints(epath.Path(copied), 2, inputs.fingerprints()) as checkpoints:
        checkpoints.discard_unfinished()
        assert checkpoints.latest == STEPS
        checkpoints.save(8, last, train_batches(inputs.tokens, run.data))
        checkpoints.wait()
        assert checkpoints.latest == 8
    assert_same_bits(restored(run, inputs, copied, at=8), last)


FULL_DISK = """
import resource, signal, sys
from engram_jax.cli import main
from engram_jax.runs import train

def limited(self, step, state, batches):
    self.wait()
    if step == 6:  # no file may be longer than this from now on; the records are shorter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
    save(self, step, state, batches)

save, train.Checkpoints.save = train.Checkpoints.save, limited
sys.exit(main.main(["train", sys.argv[1], "--out", sys.argv[2]]))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(
    run, inputs, whole, tmp_path, compilations
):
    (tmp_path / "config").write_text(json.dumps(to_dict(run)))
    shutil.copytree(compilations, tmp_path / "compiled")  # may be cut off
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "PYTHONWARNINGS": "ignore",
           "PYTHONPATH": str(pathlib.Path(train.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "config"), str(tmp_path / "run")],
        env=env, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert "the checkpoint of step 6 could not be written" in lines[0]
    assert "the last good one is of step 3" in lines[0]
    place = tmp_path / "run" / "checkpoints"
    assert int(restored(run, inputs, place).step) == 3
    train.train(run, tmp_path / "run", silent)  # there is room again
    records = RunDirectory(tmp_path / "run")
    assert sorted(map(str, curve(records))) == sorted(map(str, curve(whole)))
