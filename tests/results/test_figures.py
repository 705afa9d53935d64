"""Every committed table gives its figure and its text again."""

import re
import shutil

import matplotlib.pyplot as plt
import pytest

from engram_jax.results import arms
from engram_jax.sweeps.sweep import from_csv, to_csv
from experiments import figures
from experiments.allocation import report as allocation
from experiments.looking_inside import measure
from experiments.looking_inside import report as looking_inside
from experiments.memory_scaling import report as memory_scaling
from experiments.row_optimizers import report as row_optimizers

COMMITTED = [path.parent.name for path in figures.HERE.glob("*/results.csv")]


@pytest.mark.parametrize("name", COMMITTED)
def test_a_figure_is_rebuilt_from_its_table(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    table = (figures.HERE / name / "results.csv").read_text()
    (tmp_path / name / "results.csv").write_text(table)
    monkeypatch.setattr(figures, "HERE", tmp_path)
    text = figures.rebuild(name)
    image, = (tmp_path / name).glob("*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    for result in from_csv(table):
        arm = result.get("arm") or arms.arm(result).split("-x")[0].removesuffix("-bf16")
        # Those of `tokens` are GROUP-ARM-TIMESx: a part each group, and a column for its tokens.
        longer = re.fullmatch(r"([a-z_]+)-(.+)-\d+x", arm)
        for words in longer.groups() if name == "tokens" else [arm]:
            assert words in text


EFFECT = r"[+-]\d\.\d{4}(?: \([^)]*\))? \[\d\]"  # with an interval, and how many seeds it has


@pytest.mark.parametrize(("name", "written", "count"), [
    ("tuning", r"-0\.\d{4} \([^)]*\)(?= \|$)", 2),
    ("capacity", r"\b\d+ \(\d+ to \d+\)(?= \|)", 4),
    ("tokens", EFFECT, 40)])
def test_what_a_page_says_is_what_its_table_prints(name, written, count, tmp_path, monkeypatch):
    shutil.copytree(figures.HERE / name, tmp_path / name, ignore=lambda *_: ["__pycache__"])
    monkeypatch.setattr(figures, "HERE", tmp_path)
    page, text = (tmp_path / name / "README.md").read_text(), figures.rebuild(name)
    said = re.findall(written, page, re.MULTILINE)
    assert len(said) >= count
    assert [number for number in said if number not in text] == []


def test_an_experiment_without_results_has_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    assert figures.rebuild("controls") is None


def made(name, seed, loss, text="code"):
    return {"name": f"{name}-seed{seed}", "seed": seed, "loss": loss, "text": text,
            "total_params": 10, "active_params": 5, "memory_params": 2, "flops_per_token": 7,
            "tokens_per_s": 100.0 * seed}


def test_the_table_pairs_arms_by_seed_within_a_text():
    results = [made("a", 1, 3.0), made("b", 1, 2.9), made("a", 2, 3.2), made("b", 2, 3.0),
               made("a", 1, 9.0, "prose"), made("b", 1, 9.5, "prose")]
    code, prose = arms.table(results, "a").split("\n\n")
    first, second = code.splitlines()[2:]
    assert first.split()[:2] == ["a", "3.1000"]
    assert "-0.1500 (-0.7853 to +0.4853)" in second  # the mean of -0.1 and -0.2, t(0.975, 1) 12.71
    assert second.split()[-1] == "150"
    assert "+0.5000" in prose.splitlines()[-1]
    assert prose.startswith("prose")


def test_runs_that_diverged_are_named_and_have_no_part_in_means_or_curves():
    nan = float("nan")
    results = [made("a", 1, 3.0), made("b", 1, 2.9), made("c", 1, 2.0),
               made("a", 2, 3.2), made("b", 2, nan), made("c", 2, 2.1)]
    lines = arms.table(results, "a").splitlines()
    assert lines[3].split()[:3] == ["b", "diverged", "2"]
    assert "-1.0500" in lines[4]
    assert lines[-1] == "b-seed2: diverged"
    against = arms.table(results, "b").splitlines()
    assert [line.split()[0] for line in against[2:]] == ["a", "b", "c", "b-seed2:"]
    assert "nan" not in "\n".join([*lines, *against])
    runs = [made("no-memory", 0, 4.0) | {"memory": "no memory", "slots": 0}] + [
        made(f"engram-{slots}", 0, loss) | {"memory": "Engram", "slots": slots}
        for slots, loss in ((10, 3.9), (100, nan), (1000, 3.7), (10_000, 3.6))]
    assert memory_scaling.table(runs).endswith(
        "code, Engram: no line, for engram-100-seed0 diverged")
    runs = [made(f"small-rho-{rho}", 0, loss) | {"rho": rho}
            for rho, loss in ((0.4, 3.9), (0.6, nan), (0.8, 3.7), (1, 3.6))]
    assert allocation.table(runs).endswith("small: no parabola, for small-rho-0.6-seed0 diverged")


def test_row_optimizers_of_which_one_diverged():
    table = figures.HERE / "row_optimizers" / "results.csv"
    results = from_csv(table.read_text())
    lost = results[-1] | {"loss": float("nan")}
    text = row_optimizers.table([*results[:-1], lost])
    assert text.endswith(f"{lost['name']}: diverged")
    assert "nan" not in text
    plt.close(row_optimizers.figure([*results[:-1], lost]))


# --- Looking inside ---


def test_lens_and_cka_of_another_seed_become_a_table(monkeypatch):
    asked = []

    def analyze(what, directories):
        first, *others = [str(directory) for directory in directories]
        asked.append((what, first, *others))
        if what == "lens":
            return {first: [2.0 + int(first[-1]), 0.0]}
        return {"of": first, "with": {others[0]: {"cka": [[0.9, 0.5], [0.4, 0.8]],
                                                  "soft_alignment": [0.3, 0.6]}}}

    monkeypatch.setattr(measure, "analyze", analyze)
    rows = measure.measured(["a", "b"])
    pairs = [words[1:] for words in asked if words[0] == "cka" and words[1].startswith("b/")]
    assert pairs == [(f"b/no-memory-seed{other}", f"b/{arm}-seed{seed}")
                     for arm in ("no-memory", "engram-65536")
                     for seed, other in ((0, 1), (1, 2), (2, 0))]
    assert {"text": "code", "measure": "cka", "arm": "layer-1", "seed": 2, "layer": 1, "of": 0,
            "value": 0.5} in rows
    found = looking_inside.table(from_csv(to_csv(rows))).splitlines()
    assert found[0] == "code, kl"
    assert found[1].split()[:4] == ["no-memory", "block", "0", "3.0000"]
    assert "+0.0000 (+0.0000 to +0.0000)" in found[3]
