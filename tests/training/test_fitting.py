"""How many parts a step has, and what is kept, by the memory of a device."""

import importlib.util
import itertools

import jax
import pytest
from micro import curve, micro, plain, with_data, with_model, with_training, write_text

from engram_jax.costs.slices import slice_of
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.recipes import recipe
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.train import train
from engram_jax.training.fitting import device_bytes, fitted, kept_bytes, step_bytes
from engram_jax.training.placement import make_mesh, placed_state
from engram_jax.training.step import train_step

pytestmark = pytest.mark.usefixtures("compilations")

GIB = 2**30
KINDS = ("none", "outputs", "ffn", "block")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed (extra aot)")


def a_try(run, parts, remat):
    return with_training(with_model(run, remat=remat), accumulate=parts)


def open_run():
    """Eight sequences on two devices, longer than wide, so that what is kept counts."""
    run = with_data(plain(micro("none")), batch_size=8, sequence_length=256)
    return a_try(run, 0, "auto")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 2, jax.devices()[:2])


def test_the_fewest_parts_and_then_what_keeps_most(mesh):
    run = open_run()
    tries = [a_try(run, parts, kind) for parts, kind in itertools.product((1, 2, 4), KINDS)]
    sizes = [step_bytes(each, mesh) for each in tries]
    assert fitted(run, mesh, max(sizes)) == tries[0]
    assert fitted(run, mesh, sizes[0] - 1) != tries[0]
    for memory in sizes:
        fits = next(each for each, size in zip(tries, sizes, strict=True) if size <= memory)
        assert fitted(run, mesh, memory) == fits
    assert len({fitted(run, mesh, memory) for memory in sizes}) > 4


def test_where_nothing_fits_it_is_what_takes_least(mesh):
    assert fitted(open_run(), mesh, 1) == a_try(open_run(), 4, "block")


def test_what_is_named_stays(mesh):
    run = open_run()
    assert fitted(with_training(run, accumulate=2), mesh, 1) == a_try(run, 2, "block")
    assert fitted(with_model(run, remat="none"), mesh, 1) == a_try(run, 4, "none")
    assert fitted(with_model(run, remat="ffn"), mesh, 2**40) == a_try(run, 1, "ffn")
    both = a_try(run, 2, "outputs")
    assert fitted(both, mesh, 1) is both


def test_less_is_kept_for_less_memory():
    sizes = [kept_bytes(with_model(micro("none"), remat=kind).model, 256) for kind in KINDS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(KINDS)


def test_what_a_block_leaves_can_be_counted():
    """Its input of four streams, and what mixes them twice: products, and three matrices; of
    the FFN [T, D] more. One block more, so the ends of the network do not count."""
    def of_a_block(remat):
        run = with_model(micro("none"), remat=remat, stream_layout="apart", engram=None)
        few, more = (kept_bytes(with_model(run, depth=depth).model, 256) for depth in (2, 3))
        return (more - few) / (4 * 256)

    mixing = 2 * ((24 + 1) + (4 + 4 + 16))
    assert of_a_block("block") == 4 * 32 + mixing
    assert of_a_block("ffn") == 4 * 32 + mixing + 32


def test_a_fusion_leaves_the_streams_and_its_rows():
    """And not what it computes of them, 15 times as much, whatever of blocks is kept."""
    for remat in ("outputs", "ffn", "block"):
        run = with_model(micro("none"), remat=remat)
        fusion = (kept_bytes(run.model, 256)
                  - kept_bytes(with_model(run, engram=None).model, 256)) / (4 * 256)
        assert fusion == 4 * 32 + 2 * 2 * 8


def test_a_device_of_a_cpu_has_its_share(mesh, monkeypatch):
    monkeypatch.setattr("engram_jax.training.fitting.total_bytes", lambda: 2001)
    assert device_bytes(mesh) == 1000


def test_a_step_is_that_of_what_fits(mesh, monkeypatch):
    """Whoever calls `train_step` need not choose before."""
    monkeypatch.setattr("engram_jax.training.fitting.total_bytes", lambda: 1)

    def lowered(run):
        batch = {name: jax.ShapeDtypeStruct((8, 256), dtype) for name, dtype in (
            ("tokens_BT", "int32"), ("targets_BT", "int32"), ("starts_BT", "bool"))}
        step = train_step(run, address(run.model, CompressedVocabulary.identity(300), 0), mesh)
        return jax.jit(step).lower(placed_state(run, mesh), batch).as_text()

    assert lowered(open_run()) == lowered(a_try(open_run(), 4, "block"))


def test_a_run_records_what_it_chose_and_trains_alike(tmp_path, monkeypatch):
    run = plain(micro(write_text(tmp_path / "text")))
    mesh = make_mesh(1, 1, jax.devices()[:1])
    monkeypatch.setattr("engram_jax.training.fitting.total_bytes", lambda: 2**40)
    train(a_try(run, 0, "auto"), tmp_path / "open", lambda line: None, mesh)
    train(a_try(run, 1, "none"), tmp_path / "named", lambda line: None, mesh)
    assert curve(tmp_path / "open") == curve(tmp_path / "named")
    records = RunDirectory(tmp_path / "open")
    assert (records.env()["accumulate"], records.env()["remat"]) == (1, "none")
    assert records.config() == a_try(run, 0, "auto")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("topology", "name", "expert", "parts", "remat", "peak_gib"), [
    ("v5p:4x4x4", "engram-27b", 1, 1, "ffn", 91.6),
    ("v5e:16x16", "engram-27b", 8, 5, "outputs", 12.1),
    ("v5p:4x4x4", "engram-27b", 1, 1, "block", 81.5)])
def test_the_papers_models(topology, name, expert, parts, remat, peak_gib):
    """What libtpu 0.0.50 said of the compiled programs is within 3 % of the guess."""
    there, run = slice_of(topology), recipe(name)
    mesh = make_mesh(1, len(there.devices) // expert, there.devices, expert)
    how = a_try(run, parts, remat)
    assert step_bytes(how, mesh) / GIB == pytest.approx(peak_gib, rel=0.03)
    if remat != "block":
        assert fitted(run, mesh, int(there.chip.hbm_gib * GIB)) == how
