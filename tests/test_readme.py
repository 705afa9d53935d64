"""What the README shows works."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_drop_in_example_runs():
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code) == 2  # the other is run by test_generate.py
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


def test_every_file_that_the_readme_names_is_there():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
    tree = README.split("## What is where")[1].split("## Status")[0]
    for name in re.findall(r"\b\w+\.py\b", tree):
        assert list((ROOT / "engram_jax").glob(f"**/{name}")), name
