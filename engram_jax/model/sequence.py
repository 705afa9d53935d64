"""Sequences that are split over devices: what the network needs of the other stretches.

Almost everything in the network looks at one position alone. The fusion's convolution looks a few
positions back, into the stretch before; attention looks at everything before, so there each device
takes some heads of whole sequences instead of all heads of its stretch. The network asks a
`Stretch` for both; `alone` is the one of sequences that are whole.

Shapes: B batch, T time of a stretch, S time of the whole sequence, H heads.
"""

from typing import Protocol

import jax
import jax.numpy as jnp


class Stretch(Protocol):
    """One device's stretch of sequences that are cut into `count` equal ones."""

    @property
    def count(self) -> int:
        """How many stretches there are."""

    def positions(self, time: int) -> jax.Array:
        """The positions of a stretch of so many in the whole sequence, int32 [1, T]."""

    def before(self, x_BT: jax.Array, reach: int) -> jax.Array | None:
        """The last `reach` entries along time of the stretch before, zeros before the first;
        None where there is none before any."""

    def everywhere(self, x_BT: jax.Array) -> jax.Array:
        """All stretches [B, S, ...] from each its own [B, T, ...]."""

    def own(self, x_BS: jax.Array) -> jax.Array:
        """The own stretch [B, T, ...] of what is the whole sequence's."""

    def by_heads(self, x_BTH: jax.Array) -> jax.Array:
        """[B, T, H, ...] as [B, S, H / count, ...]: the own heads of all stretches."""

    def by_time(self, x_BSH: jax.Array) -> jax.Array:
        """The way back from `by_heads`."""

    def own_heads(self, x_CH: jax.Array) -> jax.Array:
        """The own heads, [C, H / count, ...], of what is all heads'."""


class Alone:
    """The `Stretch` that is the whole sequence."""

    count = 1

    def positions(self, time: int) -> jax.Array:
        return jnp.arange(time, dtype=jnp.int32)[None]

    def before(self, x_BT: jax.Array, reach: int) -> jax.Array | None:
        del x_BT, reach
        return None

    def everywhere(self, x_BT: jax.Array) -> jax.Array:
        return x_BT

    def own(self, x_BS: jax.Array) -> jax.Array:
        return x_BS

    def by_heads(self, x_BTH: jax.Array) -> jax.Array:
        return x_BTH

    def by_time(self, x_BSH: jax.Array) -> jax.Array:
        return x_BSH

    def own_heads(self, x_CH: jax.Array) -> jax.Array:
        return x_CH


alone: Stretch = Alone()
