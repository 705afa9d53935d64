"""Every python block of docs/released_weights.md runs as it stands, on synthetic checkpoints."""

import re
from pathlib import Path

import pytest
import v41
from released import arrays, golden_files, qwen_checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "released_weights.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_has_blocks():
    assert len(BLOCKS) == PAGE.count("```python") == 4


@pytest.mark.parametrize("code", [pytest.param(code, id=str(n)) for n, code in enumerate(BLOCKS)])
def test_the_block_runs(code, tmp_path, monkeypatch, request, compilations):
    monkeypatch.chdir(tmp_path)
    if "DeepSeek-V4.1-Flash" in code:
        v41.write(tmp_path / "DeepSeek-V4.1-Flash")
    if "Qwen3.8-Flash-Next" in code:
        meta, _, weights = arrays(golden_files("qwen_ngram_0.npz")[0].values[0])
        qwen_checkpoint(tmp_path / "Qwen3.8-Flash-Next", meta, weights, parts=4)
    if "runs/mine" in code:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "mine").symlink_to(request.getfixturevalue("trained"))
    exec(compile(code, "docs/released_weights.md", "exec"), {"__name__": "page"})
