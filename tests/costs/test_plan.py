"""The plan of a run on TPUs: what it says, and what it refuses in one line."""

import importlib.util
import json

import pytest

from engram_jax.cli import main
from engram_jax.costs import slices
from engram_jax.costs.plan import GIB, Plan, _speed, asked_for, described

LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed (extra aot)")


@pytest.mark.parametrize(("message", "size"), [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
     "Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5 * GIB),
    ("Used 17.25G of 15.75G hbm.\nTotal hbm usage >= 17.50G:", 17.5 * GIB),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
     "(896.00G) exceeds available HBM (15.75G).", 896 * GIB),
    ("RESOURCE_EXHAUSTED: something else", None),
])
def test_what_the_compiler_asked_for(message, size):
    assert asked_for(message) == size


def test_what_a_chip_does_in_a_second():
    assert _speed(slices.CHIPS["v5p"]) == (1.75e9, 459e12, 2765e9)


COMMON = {"name": "tiny", "topology": "v5e:2x2", "mesh": "1x4", "devices": 4,
          "hbm_bytes": 16 * GIB, "argument_bytes": 2**20, "compile_s": 3.0}


def test_described():
    text = described(Plan(
        **COMMON, temporary_bytes=GIB, peak_bytes=2 * GIB, fits=True, squares=0, flops=12345678,
        model_flops=1e7, compute_s=0.25, collective_s=0.5, overlapping_s=0.125, step_s=0.625,
        mfu=0.321, by_scope={"attention": {"seconds": 0.2, "flops": 2e6, "sent_bytes": 2**20,
                                "collective_s": 0.5}},
        by_kind={"copies": 0.0625},
        collectives={"all-to-all": {"count": 1234, "bytes": GIB, "largest_bytes": 2**20}}))
    for part in ("1x4", "1 MiB", "2.00 GiB", "yes", f"length x length{'none':>15}",
                 "1.235e+07, 1.23 times", "0.25 s",
                 "0.125 s may", "0.625 s, MFU 32.1%", "copies", "0.0625 s",
                 "attention", "1,234 of 1.00 GiB"):
        assert part in text
    refused = described(Plan(**COMMON, reason="Ran out of memory"))
    assert "no: Ran out of memory" in refused
    assert "FLOPs" not in refused


def refused(capsys, topology, *words):
    assert main.main(["plan", "tiny", "--topology", topology, *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("topology", [
    "v9:2x2", "v5e", "v5e:", "v5e:2x", "v5e:axb", "v5e:4x4x4", "v5p:4x4", "v5e:0x2", "v5e:32x32"])
def test_slices_that_there_are_not(capsys, topology):
    assert f"topology = '{topology}'" in refused(capsys, topology)


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'engram_jax[aot]'" in refused(capsys, "v5e:2x2")


@needs_libtpu
def test_a_layout_that_libtpu_refuses(capsys):
    assert "no such slice" in refused(capsys, "v5e:3x5")


@needs_libtpu
def test_a_mesh_that_does_not_divide(capsys):
    assert "fsdp = 3" in refused(capsys, "v5e:2x2", "--fsdp", "3")
    assert "data.batch_size = 6" in refused(capsys, "v5e:2x2", "--set", "data.batch_size=6")


SMALL = [word for setting in (  # of a length that is not that of a TPU's lanes
    "model.depth=2", "model.moe=none", "model.width=64", "training.steps=10",
    "data.sequence_length=96")
    for word in ("--set", setting)]


@needs_libtpu
def test_a_tiny_run(capsys):
    words = ["plan", "tiny", "--topology", "v5e:2x2", "--fsdp", "2", *SMALL]
    assert main.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["devices"], found["mesh"], found["fits"]) == (4, "2x2", True)
    assert found["argument_bytes"] < found["peak_bytes"] < found["hbm_bytes"]
    assert found["squares"] == 0
    assert found["flops"] > 0
    assert 0 < found["compute_s"] < found["step_s"] < 1
    assert 0 < found["mfu"] < 1
    assert sum(part["seconds"] for part in found["by_scope"].values()) == pytest.approx(
        found["compute_s"])
    assert sum(found["by_kind"].values()) == pytest.approx(found["compute_s"])
    assert sum(part["flops"] for part in found["by_scope"].values()) == found["flops"]
    for kind in ("all-gather", "all-to-all"):
        total = found["collectives"][kind]
        assert total["count"] > 0
        assert 0 < total["largest_bytes"] <= total["bytes"]


@needs_libtpu
def test_what_a_run_leaves_to_the_devices_is_chosen_and_said(capsys):
    words = ["plan", "tiny", "--topology", "v5e:2x2", *SMALL, "--set", "training.accumulate=0",
             "--set", "model.remat=auto"]
    assert main.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["accumulate"], found["remat"]) == (1, "none")
    assert main.main([*words, "--set", "data.batch_size=8", "--set", "training.accumulate=2"]) == 0
    assert "a step in parts, keeping            2, none" in capsys.readouterr().out


@needs_libtpu
def test_a_run_that_does_not_fit(capsys):
    """Logits are never whole, so it takes activations: one enormous sequence for each device."""
    words = ["plan", "tiny", "--topology", "v5e:2x2", "--json", *SMALL,
             "--set", "model.ffn=2097152", "--set", "data.sequence_length=1024"]
    assert main.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["reason"]
    assert found["peak_bytes"] > found["hbm_bytes"]


def test_unknown_recipe(capsys):
    assert main.main(["plan", "huge", "--topology", "v5e:2x2"]) == 2
    assert "no such recipe" in capsys.readouterr().err


@pytest.mark.parametrize("depth", ["-1", "2", "5"])
@needs_libtpu
def test_a_depth_of_which_nothing_follows(capsys, depth):
    error = refused(capsys, "v5e:2x2", "--set", "model.depth=10", "--depth", depth)
    assert f"depth = {depth}" in error


@pytest.mark.slow
@needs_libtpu
def test_a_few_blocks_tell_of_all(capsys):
    """Two Engram layers, experts, streams, accumulation: what differs between the cuts."""
    words = ["plan", "tiny", "--topology", "v5e:2x2", "--json", *(word for setting in (
        "model.depth=11", "model.engram.layers=[1, 5]", "model.streams=2", "model.remat=block",
        "training.accumulate=2") for word in ("--set", setting))]
    assert main.main(words) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main.main([*words, "--depth", "3"]) == 0
    cut = json.loads(capsys.readouterr().out)
    assert (whole["depth"], cut["depth"]) == (0, 3)
    assert cut["temporary_bytes"] is None
    assert cut["argument_bytes"] == pytest.approx(whole["argument_bytes"], rel=0.05)
    for what in ("flops", "compute_s", "collective_s", "step_s", "mfu"):
        assert cut[what] == pytest.approx(whole[what], rel=0.05), what
    # The whole has a segment more, and so more code; of `tiny` much of the peak is code.
    assert cut["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.15)
    assert set(cut["by_scope"]) == set(whole["by_scope"])
    sent = {name: {kind: each["bytes"] for kind, each in plan["collectives"].items()}
            for name, plan in (("whole", whole), ("cut", cut))}
    assert sum(sent["cut"].values()) == pytest.approx(sum(sent["whole"].values()), rel=0.05)
    assert sent["cut"] == pytest.approx(sent["whole"], rel=0.15)
