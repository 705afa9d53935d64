"""What a setting must fulfil, or else one line that names it."""

import math
import numbers
from typing import Any

from engram_jax.errors import UserError


def require(condition: bool, field: str, value: object, right: str) -> None:
    """Raise the one-line UserError for a setting unless `condition` holds."""
    if not condition:
        raise UserError(f"{field} = {value!r}: {right}")


def require_at_least(config: Any, least: float, where: str, *fields: str) -> None:
    """Raise the one-line UserError for the first field that is below `least`, infinite or NaN."""
    for field in fields:
        value, name = getattr(config, field), f"{where}.{field}"
        require(math.isfinite(value), name, value, "must be finite")
        require(value >= least, name, value,
                f"must be at least {least}" if least else "must not be negative")


def require_whole(config: Any, where: str, *fields: str) -> None:
    """Raise the one-line UserError for the first field that is not a whole number."""
    for field in fields:
        value = getattr(config, field)
        require(_is_whole(value), f"{where}.{field}", value, "must be a whole number")
        object.__setattr__(config, field, int(value))


def require_all_whole(config: Any, where: str, field: str) -> None:
    """Raise the one-line UserError for a field that is not a tuple (or list, which is made one) of
    whole numbers."""
    values = getattr(config, field)
    require(isinstance(values, (tuple, list)) and all(map(_is_whole, values)), f"{where}.{field}",
            values, "must be a tuple of whole numbers, for example (1, 2)")
    object.__setattr__(config, field, tuple(map(int, values)))


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
