"""What the README shows works."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from engram_jax.cli.main import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_drop_in_example_runs():
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code) == 3  # the others are run by test_cli.py and test_generate.py
    names = {}
    exec(compile(code[0], "README.md", "exec"), names)
    block, hidden = names["Block"](), jnp.ones((2, 8, 32))
    token_ids = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    params = jax.jit(block.init)(jax.random.key(0), hidden, token_ids)
    apply = jax.jit(block.apply)
    out = apply(params, hidden, token_ids)
    assert out.shape == hidden.shape
    changed = apply(params, hidden, token_ids.at[:, -1].set(99))
    assert jnp.array_equal(changed[:, :-1], out[:, :-1])
    assert not jnp.array_equal(changed[:, -1], out[:, -1])


def test_the_tree_is_the_folders():
    tree = README.split("## What is where")[1].split("## Status")[0]
    rooms = set(re.findall(r"^      (\w+)/", tree, re.MULTILINE))
    assert rooms == {path.parent.name for path in (ROOT / "engram_jax").glob("*/__init__.py")}
    for name in re.findall(r"^    (\w+/|\w+\.md)", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\b\w+\.py\b", tree):
        assert list(ROOT.glob(f"*/{name}")), name


def commands(page):
    """The command lines of a page's code, as words: lines of their own, and those in the text."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4,}(?:[^\n`#]*[ /\"])?(engram-jax [^\n]*)$", text, re.MULTILINE)
    lines += re.findall(r"`(?:[\w./]*/)?(engram-jax [^`]+)`", text)
    for line in lines:
        if line.count('"') % 2:  # it stood in quotation marks itself
            line = line.rstrip().removesuffix('"')
        words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
        if words[0] != "COMMAND" and len(words) > 1:
            yield words


@pytest.mark.parametrize("page", ["README.md", "BUILD.md", *(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("docs/*.md"),
                                             *ROOT.glob("experiments/**/*.md")])])
def test_every_command_of_a_page_is_one(page, capsys):
    for words in commands(page):
        assert understood(words), (words, capsys.readouterr().err)


def understood(words):
    try:
        parser().parse_args(words)
    except SystemExit as stop:
        return stop.code == 0
    return True


def test_what_is_no_command_is_not_understood():
    assert not understood(["describe"])
    assert not understood(["train", "tiny", "--output", "x"])


def test_there_are_commands_and_the_makefile_has_its_own():
    assert len(list(commands("README.md"))) > 15
    assert len(list(commands("docs/clusters.md"))) > 5
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "BUILD.md"):
        for target in re.findall(r"(?:`|^    )make (?:PYTHON=\S+ )?([\w-]+)",
                                 (ROOT / page).read_text(), re.MULTILINE):
            assert target in targets, target


def test_every_file_that_the_readme_names_is_there():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
