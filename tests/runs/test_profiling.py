"""A profile of chosen steps."""

import gzip
import json

import pytest

from engram_jax.errors import UserError
from engram_jax.runs import train
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.profiling import parsed

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.mark.slow
def test_the_chosen_steps_are_traced_and_change_nothing(trained, tmp_path):
    run = RunDirectory(trained).config()
    train.train(run, tmp_path, lambda line: None, profile="3:5")
    assert RunDirectory(tmp_path).result()["loss"] == RunDirectory(trained).result()["loss"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    [perfetto] = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = {int(event["args"]["step_num"]) for event in events
             if event.get("name") == "train" and "step_num" in event.get("args", {})}
    assert steps == {3, 4, 5}


@pytest.mark.parametrize("steps", ["3", "a:b", "5:3", "0:2", "1:2:3", ":"])
def test_other_words_are_refused(steps):
    with pytest.raises(UserError, match="--profile"):
        parsed(steps)
