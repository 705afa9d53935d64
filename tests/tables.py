"""Tables by plain loops, for the tests of what changes them."""

import numpy as np


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(layout, rows_RD):
    """The table of `layout` that holds `rows_RD`, by plain loops; padding rows hold 777."""
    table = np.full(layout.shape, 777, rows_RD.dtype)
    for row, values in enumerate(rows_RD):
        table[row % layout.shards, row // layout.shards] = values
    return table


def flat(layout, table_SRD):
    """The rows of a table in order, [rows, ...], and its padding rows."""
    swapped = np.asarray(table_SRD).swapaxes(0, 1)
    swapped = swapped.reshape(-1, *swapped.shape[2:])
    return swapped[:layout.rows], swapped[layout.rows:]
