"""What runs of a sweep share is compiled once, and changes no bit."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from micro import STEPS, micro, plain, with_training, write_text

from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.train import train
from engram_jax.sweeps import compilations, launchers
from engram_jax.sweeps.reproducing import compared
from engram_jax.sweeps.sweep import seeded


def silent(line):
    del line


@pytest.fixture
def quickly(monkeypatch):
    """Programs are compiled quickly, and kept though they are."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setitem(
        compilations.SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_seeds_share_their_programs_and_have_the_same_bits(tmp_path):
    text = write_text(tmp_path / "text.txt")
    run = with_training(plain(micro(text)), checkpoint_every=0)
    first, second = seeded([run], (0, 1))
    folder = compilations.folder()
    assert not folder.exists()
    jax.jit(lambda x: x * 17)(jnp.ones(3))  # something is compiled before the sweep begins
    launchers.local([first], epath.Path(tmp_path / "sweep"), silent)
    steps = sorted(path.name for path in folder.glob("jit_step*-cache"))
    assert len(steps) == 2, "the step and the evaluation"
    launchers.local([second], epath.Path(tmp_path / "sweep"), silent)
    assert sorted(path.name for path in folder.glob("jit_step*-cache")) == steps
    assert jax.config.values["jax_compilation_cache_dir"] is None
    jax.clear_caches()
    kept = sorted(folder.iterdir())
    alone = train(second, tmp_path / "alone", silent)
    swept = RunDirectory(tmp_path / "sweep" / second.name)
    assert sorted(folder.iterdir()) == kept, "out of a sweep nothing is kept"
    assert swept.result()["loss"] == alone["loss"]
    metrics = RunDirectory(tmp_path / "alone").metrics()
    assert compared(swept.metrics(), metrics) == (STEPS, None)


def test_one_of_several_processes_keeps_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with compilations.kept_compilations():
        assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_cache_of_the_user_s_own_is_left(tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    with compilations.kept_compilations():
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
    jax.config.update("jax_compilation_cache_dir", before)


def flip(program):
    data = bytearray(program.read_bytes())
    data[len(data) // 2] ^= 1
    program.write_bytes(data)


def left_by_a_kill(program):
    program.write_bytes(program.read_bytes()[:100])
    program.with_name(f"{program.name}.sha256").unlink()


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("spoil", [
    flip, pytest.param(left_by_a_kill, marks=pytest.mark.slow)])
def test_a_program_that_is_not_whole_is_compiled_again(spoil, tmp_path, monkeypatch):
    """As it is, the first may end the process, and the second be warned of at every start."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))

    def run():
        jax.clear_caches()
        with compilations.kept_compilations():
            return float(jax.jit(lambda x: (x * 19).sum())(jnp.arange(3)))

    before = run()
    programs = list(compilations.folder().glob("jit*-cache"))
    whole = {program: program.stat().st_mtime_ns for program in programs}
    assert run() == before
    assert {program: program.stat().st_mtime_ns for program in programs} == whole
    spoilt = max(programs, key=lambda program: program.stat().st_size)
    spoil(spoilt)
    assert run() == before
    kept = {program: program.stat().st_mtime_ns for program in programs}
    assert {program for program in programs if kept[program] != whole[program]} == {spoilt}
    assert run() == before
    assert {program: program.stat().st_mtime_ns for program in programs} == kept
