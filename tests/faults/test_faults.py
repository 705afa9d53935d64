"""A small part of the campaign of faults; all of it is `make test-faults`."""

import random
import shutil

import pytest
from faults import campaign, fuzz

from engram_jax.runs.export import export_tables

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.fixture(scope="module")
def fuzzed(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    made = fuzz.Fuzz(trained, folder)
    shutil.rmtree(made.run / "tables", ignore_errors=True)  # another test may have made some
    export_tables(made.run, "fp8")
    return made


def test_files_of_strangers_are_taken_or_refused_in_one_line(fuzzed):
    outcomes = fuzzed.files(8)
    assert not [one for many in outcomes.values() for one in campaign.lost(many)]
    assert all("stopped" in many for kind, many in outcomes.items() if kind != "metrics.jsonl")


def test_settings_and_prompts_of_strangers(fuzzed):
    assert not campaign.lost(fuzzed.overrides(60))
    assert not campaign.lost(fuzzed.prompts(40))


def test_a_damaged_table_is_never_taken_for_whole(fuzzed):
    [path] = (fuzzed.run / "tables").glob("*.table")
    assert fuzz.tables(path, random.Random(0), 20) == ["stopped"] * 20


@pytest.mark.slow
def test_a_few_of_all_faults_are_survived(tmp_path):
    rows = campaign.campaign(tmp_path, share=0.04)
    assert not [one for _, outcomes in rows for one in campaign.lost(outcomes)]
    assert all(outcomes for _, outcomes in rows)


@pytest.mark.faults
def test_the_whole_campaign(tmp_path):
    rows = campaign.campaign(tmp_path, parts=2)
    assert not [one for _, outcomes in rows for one in campaign.lost(outcomes)]
    tried = {name: len(outcomes) for name, outcomes in rows}
    assert sum(count for name, count in tried.items() if name.startswith("SIG")) >= 200
    assert sum(count for name, count in tried.items() if name.startswith("fuzzed")) >= 2000
