"""docs/data.md runs as it stands, and says what is so."""

import re
from pathlib import Path

from engram_jax.data import read_ahead, reading, records, remembered, splitting

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(code) == 4
    names = {"__name__": "data"}
    for block in code:  # one after the other, as they are read
        exec(compile(block, "docs/data.md", "exec"), names)
    assert "train-00000.npy: its ids' sha256 is" in capsys.readouterr().out


def test_the_numbers_of_the_page_are_the_code_s():
    text = " ".join(PAGE.split())
    assert read_ahead.MOST_BYTES == 2**30
    for words in (f"{read_ahead.MOST_DOCUMENTS:,} documents", "more than 1 GiB",
                  f"{splitting.MANY_DOCUMENTS} documents or more",
                  f"may be {records.LONGEST_RECORD // 2**20} MiB long",
                  f"nested {reading.DEEPEST} levels deep"):
        assert words in text, words
    assert splitting.PIECE_CHARACTERS == 2**20
    assert remembered.SETTLED_NS == 2 * 10**9


def test_every_rule_and_suffix_stands_in_it():
    for words in ("`documents`", "`tail`", "`pieces`", *records.LINES, ".json", ".parquet",
                  ".gz", ".zst"):
        assert words in PAGE
