"""The network: pure functions over a parameter tree, with rows as an input.

What is named here is for other people's networks, too, and stays: the fusion alone, as a pure
function, as a Linen module and (in `engram_jax.model.nnx`) as an NNX module.
"""

from typing import TYPE_CHECKING

from engram_jax.faces import face

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

__getattr__, __dir__ = face(__name__, _MODULES)
