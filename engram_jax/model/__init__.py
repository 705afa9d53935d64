"""The network: pure functions over a parameter tree, with rows as an input.

What is named here is for other people's networks, too, and stays: the fusion alone, as a pure
function, as a Linen module and (in `engram_jax.model.nnx`) as an NNX module.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_jax.model.engram import Fused, fuse, init_engram
    from engram_jax.model.linen import Engram, EngramFusion

_MODULES = {
    "Engram": "linen",
    "EngramFusion": "linen",
    "Fused": "engram",
    "fuse": "engram",
    "init_engram": "engram",
}

__all__ = ["Engram", "EngramFusion", "Fused", "fuse", "init_engram"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
