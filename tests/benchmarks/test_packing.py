"""bench pack, small; and that a text does not have to fit into memory."""

import gzip
import json

import pytest

from engram_jax.benchmarks import packing
from engram_jax.cli import main


@pytest.mark.slow
def test_one_core_and_all_make_the_same_shards(monkeypatch, capsys):
    monkeypatch.setattr(packing, "MEMBER_DOCUMENTS", 300)
    monkeypatch.setattr(packing, "VOCABULARY", 400)
    assert main.main(["bench", "pack", "--megabytes", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["same_bytes"]
    assert 1 <= values["packed_mb"] < 1.5
    assert values["speedup"] == values["seconds_one_core"] / values["seconds_all_cores"]
    assert 20 < values["peak_rss_mb_one_core"] < 600


def test_bench_refuses_what_is_not_its_own(capsys):
    assert main.main(["bench", "hash", "--megabytes", "1"]) == 2
    assert "--megabytes is of bench pack" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Six times the text, 125 MB more, and the same memory."""
    documents = packing._documents(packing.np.random.default_rng(0))
    packing.train_bpe(documents[:300], 400).save(str(tmp_path / "tokenizer.json"))
    size = packing._write(tmp_path / "text.jsonl.gz", documents, 0)
    member = (tmp_path / "text.jsonl.gz").read_bytes()
    peaks = []
    for count in (10, 60):
        (tmp_path / "text.jsonl.gz").write_bytes(member * count)
        peaks.append(packing._measured(tmp_path, packing.cores()).peak_rss)
    assert size * 50 > 100e6
    assert peaks[1] < peaks[0] + 50e6


def test_the_text_is_what_it_says(tmp_path):
    size = packing._write(tmp_path / "a.gz", ["one", "zwölf"], 100)
    rows = [json.loads(line) for line in gzip.decompress((tmp_path / "a.gz").read_bytes()).split(
        b"\n") if line]
    assert size == sum(len(row["text"].encode()) for row in rows)
    assert {row["text"] for row in rows} == {"one", "zwölf"}
