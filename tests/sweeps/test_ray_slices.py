"""A run on a TPU slice of two hosts, stood for by two nodes of a Ray cluster on this machine."""

import dataclasses
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import psutil
import pytest
from micro import micro, plain, with_data, with_model, write_text

from engram_jax.errors import UserError
from engram_jax.runs.directory import RunDirectory
from engram_jax.sweeps import launchers, ray_tasks
from engram_jax.sweeps.ray_launcher import RayLauncher
from engram_jax.training.placement import make_mesh

pytestmark = [
    pytest.mark.usefixtures("compilations"),
    # Ray starts its cluster by fork and exec, which JAX cannot tell from fork alone.
    pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning"),
]
HEAD = "TPU-v4-16-head"


def silent(line):
    del line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    made = plain(micro(text, checkpoint_every=2))
    engram = dataclasses.replace(made.model.engram, signed_root=False)
    return with_model(made, engram=engram)


@pytest.fixture(scope="module")
def slice_of_two(compilations):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    assert len(jax.devices()) == 8  # of this process; those of the cluster have one each
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_COMPILATION_CACHE_DIR": compilations,
            "RAY_USAGE_STATS_ENABLED": "0", "TPU_NAME": "slice-a", "TPU_ACCELERATOR_TYPE": "v4-16",
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
            "ENGRAM_MESH": "1x2",
        }.items():
            patch.setenv(name, str(value))
        cluster = Cluster()
        for head in ({HEAD: 1}, {}):
            cluster.add_node(num_cpus=2, resources={"TPU": 4, "slice-a": 1, **head},
                             include_dashboard=False)
        ray.init(cluster.address, log_to_driver=False)
        yield ray
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def whole(slice_of_two, run, tmp_path_factory):
    """The folder of a sweep of one run, and its lines."""
    place, said = tmp_path_factory.mktemp("whole"), []
    RayLauncher(resources={HEAD: 1})([run], place, said.append)
    return place, said


@pytest.mark.slow
def test_a_process_on_each_host_trains_a_run(whole, run, tmp_path):
    place, said = whole
    records = RunDirectory(place / run.name)
    assert (records.env()["processes"], records.env()["mesh"]) == (2, "1x2")
    assert len([line for line in said if "the first one compiles" in line]) == 1
    [alone] = launchers.local([run], tmp_path, silent, make_mesh(1, 2))
    assert records.result()["loss"] == pytest.approx(alone["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_killed_process_changes_nothing(slice_of_two, whole, run, tmp_path):
    said = []
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_member, tmp_path / run.name)
        RayLauncher(resources={HEAD: 1})([run], tmp_path, said.append)
        killed.result()
    assert any("going on from step" in line for line in said)
    found, before = (RunDirectory(place / run.name) for place in (tmp_path, whole[0]))
    assert found.result()["loss"] == before.result()["loss"]


def kill_a_member(place):
    """Kill the process that is not the first, once there is a checkpoint."""
    while not (place / "config.json").exists():
        time.sleep(0.01)
    members = [child for child in psutil.Process().children(recursive=True)
               if "ray::_member" in " ".join(child.cmdline())]
    assert len(members) == 2
    while not (place / "checkpoints" / "2").exists():
        time.sleep(0.002)
    members[1].send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_the_line_of_a_process_ends_the_sweep(slice_of_two, run, tmp_path):
    bad = with_data(run, path="/nowhere/at/all")
    with pytest.raises(UserError, match=r"^data.path = '/nowhere/at/all': does not exist;"):
        RayLauncher(resources={HEAD: 1})([bad], tmp_path, silent)


def test_which_resources_are_a_slice():
    assert ray_tasks.wants_slice({"CPU": 1, "TPU-v6e-16-head": 1})
    assert not ray_tasks.wants_slice({"CPU": 1, "TPU": 4, "TPU-V6E": 1})


def test_the_cause_of_a_failure_counts():
    desk = ray_tasks.Desk()
    desk.fail("run", ray_tasks.MACHINE, "lost another process")
    desk.fail("run", ray_tasks.USER, "data.path = 3")
    desk.fail("run", ray_tasks.MACHINE, "heard of it")
    assert desk.take_failure("run") == (ray_tasks.USER, "data.path = 3")
    assert desk.take_failure("run") is None
