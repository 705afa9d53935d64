"""Tables on a mesh: a memory for a training step of one's own, and the parts that it is made of.

The names below stay; what is not among them is free to change. They are imported when asked for.
"""

from typing import TYPE_CHECKING

from engram_jax.faces import face

if TYPE_CHECKING:
    from engram_jax.tables.exchange import Exchange
    from engram_jax.tables.layout import TableLayout
    from engram_jax.tables.lookup import Combined, Lookup, Tables
    from engram_jax.tables.memory import Memory
    from engram_jax.tables.row_optimizers import (
        RowOptimizer,
        balanced_momentum,
        dense_adam,
        row_adagrad,
        row_adam,
        row_rmsprop,
    )

_MODULES = {
    "Combined": "lookup",
    "Exchange": "exchange",
    "Lookup": "lookup",
    "Memory": "memory",
    "RowOptimizer": "row_optimizers",
    "TableLayout": "layout",
    "Tables": "lookup",
    "balanced_momentum": "row_optimizers",
    "dense_adam": "row_optimizers",
    "row_adagrad": "row_optimizers",
    "row_adam": "row_optimizers",
    "row_rmsprop": "row_optimizers",
}

__all__ = [
    "Combined", "Exchange", "Lookup", "Memory", "RowOptimizer", "TableLayout", "Tables",
    "balanced_momentum", "dense_adam", "row_adagrad", "row_adam", "row_rmsprop",
]

__getattr__, __dir__ = face(__name__, _MODULES)
