"""A trained run out as safetensors and in again, bit for bit; what is altered is refused."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import MachineError, UserError
from engram_jax.insides.observing import open_run
from engram_jax.interop import safetensors
from engram_jax.interop.export import export_run, import_run, open_export
from engram_jax.interop.strip import strip_run
from engram_jax.model import transformer
from engram_jax.runs.checkpoints import last_checkpoint
from engram_jax.runs.directory import RunDirectory
from engram_jax.tables.layout import gather_rows, layout_of
from engram_jax.training.placement import placed_state, single_mesh

PYTHON = os.environ.get("ENGRAM_TORCH_PYTHON", sys.executable)


@pytest.fixture(scope="module", name="exported")
def an_export_in_small_files(trained, tmp_path_factory):
    return export_run(trained, tmp_path_factory.mktemp("out") / "exported", shard_bytes=3000)


def rows_of(opened, name):
    site, = (site for site in opened.reader.addressing.sites if site.name == name)
    layout = layout_of(site)
    return np.asarray(layout.gather(opened.state.tables[name], np.arange(site.rows)))


def test_an_export_imported_again_is_bit_equal(trained, exported, tmp_path, compilations):
    import_run(exported, tmp_path / "back")
    before, after = open_run(RunDirectory(trained)), open_run(RunDirectory(tmp_path / "back"))
    for field in ("params", "router_bias"):
        ours, theirs = (getattr(opened.state, field) for opened in (after, before))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(rows_of(after, "layer_0"), rows_of(before, "layer_0"))
    assert after.run == before.run
    assert after.reader.fingerprints() == before.reader.fingerprints()
    assert [path.name for path in (tmp_path / "back/checkpoints").iterdir()] == ["7"]


def test_files_have_the_size_that_was_asked_for_and_their_sums(exported):
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 5
    tensors = safetensors.open_tensors(exported)
    for file in files:
        own = [tensor for tensor in tensors.values() if tensor.path == file]
        assert len(own) == 1 or sum(tensor.nbytes for tensor in own) <= 3000
    parts = [name for name in tensors if name.startswith("tables.layer_0.")]
    assert len(parts) > 1
    sums = dict(reversed(line.split("  ")) for line in
                (exported / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.name for path in exported.iterdir()} - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest


def test_rows_are_in_the_order_of_their_ids(trained, exported):
    opened = open_export(exported)
    table = opened.tables["layer_0"]
    rows = table.format.unpack_numpy(table.lookup(np.arange(table.rows)))
    np.testing.assert_array_equal(rows, rows_of(open_run(RunDirectory(trained)), "layer_0"))
    opened.close()


@pytest.fixture(name="copied")
def a_copy(exported, tmp_path):
    target = tmp_path / "copied"
    target.mkdir()
    for path in exported.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def with_new_sums(folder):
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
                   for path in sorted(folder.iterdir()) if path.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text(sums)


def test_an_export_that_is_altered_or_not_whole_is_one_line_and_leaves_nothing(copied, tmp_path):
    first = sorted(copied.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is altered: its sha256 is not the one in SHA256SUMS"):
        import_run(copied, tmp_path / "back")
    first.unlink()
    with pytest.raises(UserError, match=r"SHA256SUMS: file = 'model-00001.*': is missing"):
        import_run(copied, tmp_path / "back")
    with_new_sums(copied)
    with pytest.raises(UserError, match=r"index.json: names model-00001-of-.*, which is missing"):
        import_run(copied, tmp_path / "back")
    (copied / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="holds no SHA256SUMS, so it is no export of a run"):
        import_run(copied, tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"copied"}


@pytest.mark.parametrize("name", ["config.json", "hash.json", "model-00001-of-"])
def test_a_file_without_a_sum_is_one_line(copied, name):
    sums = (copied / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copied / "SHA256SUMS").write_text("".join(line for line in sums if f"  {name}" not in line))
    with pytest.raises(UserError, match=f"SHA256SUMS: sum of = '{name}.*': is missing"):
        open_export(copied)
    (copied / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="SHA256SUMS: "):
        open_export(copied)


def test_a_step_or_a_table_that_no_run_has_is_one_line(copied):
    config = (copied / "config.json").read_text()
    for step in (-1, 2**40, True):
        (copied / "config.json").write_text(json.dumps({**json.loads(config), "step": step}))
        with_new_sums(copied)
        with pytest.raises(UserError, match=r"step = .*: must be a step of training"):
            open_export(copied)
    (copied / "config.json").write_text(config)
    tables = {name: tensor for name, tensor in safetensors.open_tensors(copied).items()
              if name.startswith("tables.")}
    for name, tensor in tables.items():
        other = np.zeros((tensor.shape[0], tensor.shape[1] + 1), np.float32)
        safetensors.save(tensor.path, {name: other})
    with_new_sums(copied)
    with pytest.raises(UserError, match=r"rows of tables.layer_0.part_0 = .*the config's"):
        open_export(copied)


def test_a_config_that_its_tensors_do_not_fit_is_refused(copied, tmp_path, compilations):
    values = json.loads((copied / "config.json").read_text())
    values["config"]["model"]["width"] = 64
    (copied / "config.json").write_text(json.dumps(values))
    with_new_sums(copied)
    with pytest.raises(UserError, match=r"params.embedding: shape = \(300, 32\): must be"):
        import_run(copied, tmp_path / "back")
    del values["config"]["name"]
    (copied / "config.json").write_text(json.dumps(values))
    with_new_sums(copied)
    with pytest.raises(UserError, match=r"config.json: name: is missing"):
        open_export(copied)
    values["format"] = "zip"
    (copied / "config.json").write_text(json.dumps(values))
    with_new_sums(copied)
    with pytest.raises(UserError, match=r"format = \('zip', 1\): must be"):
        open_export(copied)
    assert not (tmp_path / "back").exists()


def test_an_export_that_fails_leaves_no_folder(trained, tmp_path, monkeypatch):
    def full(*arguments):
        raise MachineError("disk: full")
    monkeypatch.setattr("engram_jax.interop.export.Writer.write", full)
    with pytest.raises(MachineError, match="full"):
        export_run(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already; choose another name"):
        export_run(trained, tmp_path / "there")


def test_a_twin_in_pytorch_reads_the_export_and_gives_its_logits(trained, exported, tmp_path):
    tried = subprocess.run([PYTHON, "-c", "import torch, safetensors"], capture_output=True,
                           check=False)
    if tried.returncode:
        pytest.skip(f"{PYTHON} has no torch and safetensors; set ENGRAM_TORCH_PYTHON")
    tokens_BT = np.random.default_rng(0).integers(0, 300, (3, 16)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens_BT)
    script = pathlib.Path(__file__).with_name("torch_twin.py")
    subprocess.run([PYTHON, script, exported, tmp_path / "tokens.npy", tmp_path / "logits.npy"],
                   check=True, capture_output=True)
    opened = open_run(RunDirectory(trained))
    model, state = opened.run.model, opened.state
    ids = opened.reader.addressing.ids(jnp.asarray(tokens_BT))
    ours, _ = jax.jit(transformer.apply, static_argnums=4)(
        state.params, tokens_BT, gather_rows(model, state.tables, ids), state.router_bias, model)
    theirs = np.load(tmp_path / "logits.npy")
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference {worst:.1e} of the largest logit")
    assert worst < 1e-6


def test_a_run_without_its_optimizer_is_served_as_before_and_never_gone_on_with(
        trained, tmp_path, compilations):
    strip_run(trained, tmp_path / "thin")
    before, after = open_run(RunDirectory(trained)), open_run(RunDirectory(tmp_path / "thin"))
    for field in ("params", "router_bias", "tables"):
        for one, other in zip(*(jax.tree.leaves(getattr(opened.state, field))
                                for opened in (after, before)), strict=True):
            np.testing.assert_array_equal(one, other)
    (size, thin) = (sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    for folder in (trained / "checkpoints" / "7", tmp_path / "thin/checkpoints/7"))
    assert thin < 0.6 * size
    records = RunDirectory(tmp_path / "thin")
    with (last_checkpoint(records, after.reader) as checkpoints,
          pytest.raises(UserError, match=r"opt_state.* has shape none, the model wants")):
        checkpoints.restore(placed_state(after.run, single_mesh()))
