"""The pages of docs/ say what is there, and what points at them arrives."""

import itertools
import re
from pathlib import Path

import pytest

from engram_jax.cli import fields, main
from engram_jax.config import RunConfig
from engram_jax.settings import part_of, paths

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])
SPEC = (ROOT / "docs" / "spec.md").read_text()
SECTIONS = set(re.findall(r"^#+ ([\d.]+?)\.? ", SPEC, re.MULTILINE))
EQUATIONS = [int(number) for number in re.findall(r"  \((\d+)\)$", SPEC, re.MULTILINE)]


def sources():
    for folder in ("engram_jax", "tests", "experiments", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__):
                yield path.relative_to(ROOT), " ".join(path.read_text().split())


def test_equations_are_numbered_in_order():
    assert list(range(1, len(EQUATIONS) + 1)) == EQUATIONS


def test_every_cited_section_and_equation_is_there():
    citations = 0
    for path, text in sources():
        assert not re.search(r"\bSPEC\b", text), path
        pattern = r"docs/spec\.md (?:section ([\d.]*\d)|\((\d+)\))"
        for section, equation in re.findall(pattern, text):
            citations += 1
            assert section in SECTIONS if section else int(equation) in EQUATIONS, (
                path, section or equation)
        assert len(re.findall(r"docs/spec\.md", text)) == len(
            re.findall(r"docs/spec\.md (?:section \d|\(\d)", text)), path
    assert citations > 10


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_of_a_page_arrives(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith(("http:", "https:", "mailto:")):
            continue
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("page", ["docs/design.md", "docs/parts.md", "docs/spec.md"])
def test_every_module_that_a_page_names_is_there(page):
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", (ROOT / page).read_text()):
        assert any((ROOT / root / name).exists() for root in ("engram_jax", ".")), name


def test_the_drawing_of_the_house_is_the_order_of_imports():
    from test_imports import LEVELS

    design = (ROOT / "docs" / "design.md").read_text()
    house = design.split("## The house")[1].split("## The data's way")[0]
    drawn = [set(line.partition("--")[0].split()) for line in house.splitlines()
             if line.startswith("    ") and line.strip() != "|"]
    order = {room: number for number, rooms in enumerate(reversed(drawn)) for room in rooms}
    missing = {room for level in LEVELS for room in level} - set(order)
    assert not missing, missing
    heights = [[order[room] for room in level] for level in LEVELS]
    assert all(max(low) < min(high) for low, high in itertools.pairwise(heights))


def test_every_field_of_the_config_has_a_meaning():
    for name, hint in [("", RunConfig), *paths(RunConfig)]:
        if kind := RunConfig if not name else part_of(hint):
            of_kind = {field for field, _ in paths(kind) if "." not in field}
            assert fields.meanings(kind).keys() == of_kind, f"{kind.__name__} ({name})"
    assert all(field.meaning for field in fields.every_field())


def test_config_md_is_what_the_command_prints(capsys):
    assert main.main(["fields", "--markdown"]) == 0
    assert (ROOT / "docs" / "config.md").read_text() == capsys.readouterr().out, (
        "run `engram-jax fields --markdown > docs/config.md`")


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
