"""The face of a package: names that its modules define, imported when somebody asks for them.

So `import engram_jax` starts neither jax nor a room that nobody enters.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def face(package: str, modules: Mapping[str, str]
         ) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package that exports what its modules define.

    Args:
      package: the package's `__name__`.
      modules: each exported name to the module below the package that defines it.

    Returns:
      Two functions, for the package to bind; the first raises AttributeError for other names.
    """
    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})
