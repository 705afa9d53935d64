"""What a guest may import by name, and that asking for nothing starts nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["engram_jax", "engram_jax.model"])
class TestDoor:
    def test_every_name_is_there_and_documented(self, name):
        door = importlib.import_module(name)
        assert list(door.__all__) == sorted(door.__all__)
        assert set(door.__all__) <= set(dir(door))
        for exported in door.__all__:
            assert getattr(door, exported).__doc__, exported
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            door.Nothing  # noqa: B018

    def test_type_checkers_see_the_same_names(self, name):
        door = importlib.import_module(name)
        tree = ast.parse(Path(door.__file__).read_text())
        seen = {alias.name: node.module for block in tree.body if isinstance(block, ast.If)
                for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert seen == {exported: f"{name}.{module}" for exported, module in door._MODULES.items()}
        assert sorted(seen) == list(door.__all__)


@pytest.mark.parametrize("room", ["engram_jax", "engram_jax.model"])
def test_a_door_alone_starts_nothing(room):
    program = f"import sys, {room}; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True,
                          text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]
