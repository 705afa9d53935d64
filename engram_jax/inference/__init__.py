"""Text from trained models: many sequences at once, their tables wherever there is room.

What is named here has its section in docs/parts.md, and stays.
"""

from typing import TYPE_CHECKING

from engram_jax.faces import face

if TYPE_CHECKING:
    from engram_jax.inference.device_rows import DeviceRows
    from engram_jax.inference.engine import Engine, Event, Request
    from engram_jax.inference.serving import Served, served

_MODULES = {
    "DeviceRows": "device_rows",
    "Engine": "engine",
    "Event": "engine",
    "Request": "engine",
    "Served": "serving",
    "served": "serving",
}

__all__ = ["DeviceRows", "Engine", "Event", "Request", "Served", "served"]

__getattr__, __dir__ = face(__name__, _MODULES)
