"""Every python block of the pages in docs/ runs as it stands, in a folder of its own."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("compilations")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "parts.md").read_text()


def blocks(page):
    """(heading, code) of every python block, in order."""
    heading = ""
    pattern = r"^#+ ([^\n]*)$|^```python\n(.*?)^```$"
    for part in re.finditer(pattern, page, re.MULTILINE | re.DOTALL):
        if part[1] is not None:
            heading = part[1]
        else:
            yield heading, part[2]


# Their blocks go on from each other or read synthetic checkpoints, in tests/data and tests/interop.
ELSEWHERE = ("data.md", "released_weights.md")
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in ELSEWHERE)
BLOCKS = [(page, heading, code) for page in PAGES for heading, code in blocks(page.read_text())]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(("page", "code"), [
    pytest.param(page.name, code, id=f"{page.stem}-{slug(heading)}")
    for page, heading, code in BLOCKS])
def test_the_block_runs(page, code, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "runs/mine" in code:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "mine").symlink_to(request.getfixturevalue("trained"))
    exec(compile(code, f"docs/{page}", "exec"), {"__name__": "parts"})


def test_every_part_of_the_table_is_there():
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    assert BLOCKS
    for target in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert target in anchors, target
    for file in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / file).exists(), file
