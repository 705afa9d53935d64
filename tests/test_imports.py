"""Arrows between the rooms point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "engram_jax"
# A room may import itself and what stands in a row above it, never a room beside it.
LEVELS = (
    ("errors", "faces", "settled"),
    ("config", "quiet"),
    ("settings", "storage", "host_memory"),
    ("recipes", "distributed"),
    ("hashing",),
    ("tables", "offload", "data"),
    ("model",),
    ("training",),
    ("costs",),
    ("runs",),
    ("inference", "insides", "interop", "results"),
    ("sweeps", "evaluation"),
    ("report", "benchmarks"),
    ("cli",),
)
LEVEL = {room: number for number, level in enumerate(LEVELS) for room in level}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "engram_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("engram_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names
                        if alias.name.startswith("engram_jax."))


def test_every_arrow_points_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room_of(path)
        if here == "__init__":
            continue  # the front door names what lies behind it
        for there in set(imported_rooms(path)) - {here, "__version__"}:
            if LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {there}")
    assert not wrong, wrong


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(LEVEL)


ALL_MODULES = """
for name in MODULES:
    importlib.import_module(f"engram_jax.ROOM.{name}")
"""
ALL_EXPORTS = """
room = importlib.import_module("engram_jax.ROOM")
for name in room.__all__:
    assert getattr(room, name) is not None
    assert name in dir(room)
"""
WHICH = "print(*sorted({m.split('.')[1] for m in sys.modules if m.startswith('engram_jax.')}))"


def walked(room, program):
    """The rooms that a process of its own has imported after a program."""
    modules = sorted(path.stem for path in (PACKAGE / room).glob("*.py"))
    program = program.replace("ROOM", room).replace("MODULES", repr(modules))
    done = subprocess.run(
        [sys.executable, "-c", f"import importlib, sys\n{program}\n{WHICH}"], check=True,
        capture_output=True, text=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


@pytest.mark.parametrize("program", [ALL_MODULES, ALL_EXPORTS], ids=["modules", "exports"])
@pytest.mark.parametrize(("room", "strangers"), [
    ("hashing", {"tables", "offload", "model", "training", "runs"}),
    ("tables", {"offload", "model", "training", "runs"}),
    ("offload", {"tables", "model", "training", "runs"}),
])
def test_a_guest_of_one_room_walks_through_no_other(room, strangers, program):
    """All of the room, or all that it exports, with all that it imports in turn."""
    there = walked(room, program)
    assert room in there
    assert not there & strangers, there


@pytest.mark.parametrize("room", sorted(
    path.parent.name for path in PACKAGE.glob("*/__init__.py")
    if "__all__" in path.read_text() and path.parent.name not in ("hashing", "tables", "offload")))
def test_every_export_is_there(room):
    walked(room, ALL_EXPORTS)
