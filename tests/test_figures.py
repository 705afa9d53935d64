"""Every committed table gives its figure and its text again."""

import pytest

from engram_jax.analysis import arms
from engram_jax.sweeps.sweep import from_csv
from experiments import figures

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
        assert arm in text


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
