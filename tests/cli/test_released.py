"""`import`, `export --format safetensors` and `overlay` on the command line."""

import json

import numpy as np
import pytest
import v41
from released import arrays, golden_files, qwen_checkpoint

from engram_jax.cli.main import main
from engram_jax.interop import safetensors
from engram_jax.interop.released import open_released
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableWriter


def test_released_memories_come_in_with_one_command(tmp_path, capsys):
    meta, _, weights = arrays(golden_files("qwen_ngram_0.npz")[0].values[0])
    v41.write(tmp_path / "deepseek")
    qwen_checkpoint(tmp_path / "qwen", meta, weights, parts=3)
    for name, table in (("deepseek", "layer_3: 864 rows of 64 columns in fp8"),
                        ("qwen", "layer_1: 1,854 rows of 8 columns in float32")):
        assert main(["import", str(tmp_path / name), "--out", str(tmp_path / "ours" / name)]) == 0
        assert table in capsys.readouterr().out
        open_released(tmp_path / "ours" / name).close()
    (tmp_path / "deepseek" / "tokenizer.json").unlink()
    again = ["import", str(tmp_path / "deepseek"), "--out", str(tmp_path / "again")]
    assert main(again) == 2
    assert not (tmp_path / "again").exists()
    assert main([*again, "--hash", str(tmp_path / "none.json")]) == 2
    assert main([*again, "--hash", str(tmp_path / "ours/deepseek/hash.json")]) == 0


def test_a_run_goes_out_and_comes_in_and_is_evaluated_alike(
        trained, tmp_path, capsys, compilations):
    out = ["--format", "safetensors", "--out", str(tmp_path / "out")]
    assert main(["export", str(trained), *out[:2]]) == 2
    assert "safetensors needs --out" in capsys.readouterr().err
    assert main(["export", str(trained), *out]) == 0
    assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    capsys.readouterr()
    answers = []
    for run in (trained, tmp_path / "back"):
        assert main(["evaluate", str(run), "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]


def test_overlays_are_made_and_told(tmp_path, capsys):
    v41.write(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    base = tmp_path / "ours/tables/layer_1.fp8.table"
    table = DiskTable.open(base)
    rows = table.lookup(np.arange(table.rows))
    rows[[4, 9]] ^= 1
    with TableWriter(tmp_path / "new.table", table.info) as writer:
        writer.write(rows)
    table.close()
    file = str(tmp_path / "changed.safetensors")
    make = ["overlay", file, "--base", str(base), "--changed", str(tmp_path / "new.table")]
    capsys.readouterr()
    assert main(make) == 0
    assert "2 rows of 64 columns in fp8, over the table" in capsys.readouterr().out
    assert main(["overlay", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert main(make[:4]) == 2
    assert "give both --base and --changed" in capsys.readouterr().err
    assert main([*make[:4], "--changed", str(tmp_path / "ours/tables/layer_3.fp8.table")]) == 2
    assert "changed table's site = 'layer_3': must be 'layer_1'" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "line"), [
    (None, "there is no such file"), ("{", "is not JSON"), ("[]", "must be a JSON object"),
    ('{"text_config": 3}', "has neither engram_layer_ids"), ("{}", "has neither engram_layer_ids"),
    ('{"format": "engram_jax run"}', "holds no SHA256SUMS"),
])
def test_a_folder_that_is_none_of_these_is_one_line(tmp_path, capsys, config, line):
    (tmp_path / "theirs").mkdir()
    if config is not None:
        (tmp_path / "theirs/config.json").write_text(config)
    safetensors.save(tmp_path / "theirs/model.safetensors", {"a": np.zeros(3)})
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}
