"""Text from trained models: many sequences at once, their tables wherever there is room.

What is named here has its section in docs/parts.md, and stays.
"""

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
