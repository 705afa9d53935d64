"""What a setting must fulfil, or else one line that names it."""

import math
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
