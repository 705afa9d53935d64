"""Alternating L2 normalisation of the rows and columns of a table.

Dividing rows and columns by numbers only scales them, so the balanced table is never made: the
result is one factor for each row and one for each column.

Shapes: D columns; a part of the table is [..., D], its row factors are [...].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scaled(NamedTuple):
    """A table whose rows lie in several parts: row factor * entry * column factor.

    Attributes:
      parts: float32 [..., D] each.
      scales: float32 [...], the row factors of each part; 0 for rows that are 0.
      column_D: float32, the column factors.
    """

    parts: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]
    column_D: jax.Array

    def part(self, number: int) -> jax.Array:
        """The scaled entries of a part, [..., D]."""
        part, scale = self.parts[number], self.scales[number]
        return part * scale[..., None] * _row(self.column_D, part)

    def row_norms(self) -> list[jax.Array]:
        """The norms of each part's rows, [...]."""
        return [scale * jnp.sqrt(jnp.sum((part * _row(self.column_D, part)) ** 2, axis=-1))
                for part, scale in zip(self.parts, self.scales, strict=True)]

    def column_norms(self, axes: tuple[str, ...]) -> jax.Array:
        """The norms of the columns over all parts and the devices of `axes`, [D]."""
        squares = [jnp.sum((part * scale[..., None]) ** 2, axis=tuple(range(scale.ndim)))
                   for part, scale in zip(self.parts, self.scales, strict=True)]
        return self.column_D * jnp.sqrt(psum(sum(squares, start=jnp.float32(0)), axes))


def without_faint_rows(
    table: Scaled, rows: jax.Array, least: float, axes: tuple[str, ...]
) -> Scaled:
    """`table` with the rows whose norm is at most `least` of the mean over all `rows` set to 0."""
    norms = table.row_norms()
    total = psum(sum((jnp.sum(norm) for norm in norms), start=jnp.float32(0)), axes)
    mean = total / rows.astype(jnp.float32)
    return table._replace(scales=tuple(
        jnp.where(norm > least * mean, scale, 0.0)
        for norm, scale in zip(norms, table.scales, strict=True)))


def balanced(table: Scaled, rounds: int, eps: float, axes: tuple[str, ...]) -> Scaled:
    """`table` with rows, columns, ..., rows divided by their norms, `rounds` (odd) times in all.

    A rolled loop: unrolled, XLA shares products of one round with the next, at the table's size.
    """
    assert rounds % 2 == 1, rounds

    def pair(_: int, factors: tuple[tuple[jax.Array, ...], jax.Array]) -> tuple:
        divided = _columns_divided(Scaled(table.parts, *factors), eps, axes)
        divided = _rows_divided(divided, eps)
        return divided.scales, divided.column_D

    first = _rows_divided(table, eps)
    factors = jax.lax.fori_loop(0, rounds // 2, pair, (first.scales, first.column_D))
    return Scaled(table.parts, *factors)


def psum(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over the mesh `axes`, if any."""
    return jax.lax.psum(value, axes) if axes else value


def _rows_divided(table: Scaled, eps: float) -> Scaled:
    return table._replace(scales=tuple(
        _divided(scale, norm, eps)
        for norm, scale in zip(table.row_norms(), table.scales, strict=True)))


def _columns_divided(table: Scaled, eps: float, axes: tuple[str, ...]) -> Scaled:
    return table._replace(column_D=_divided(table.column_D, table.column_norms(axes), eps))


def _divided(scale: jax.Array, norm: jax.Array, eps: float) -> jax.Array:
    """`scale` over the norm; 0 for what is all 0, whose factor would grow without bound."""
    return jnp.where(norm > 0, scale / (norm + eps), 0.0)


def _row(column_D: jax.Array, part: jax.Array) -> jax.Array:
    return column_D.reshape((1,) * (part.ndim - 1) + (-1,))
