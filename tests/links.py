"""Slices of TPUs that are not there, for tests."""

import dataclasses
import itertools
from collections.abc import Sequence

from engram_jax.costs.torus import Torus


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as far as its place goes."""

    coords: tuple[int, ...]
    platform: str = "tpu"


def chips(*sizes: int, cores: int = 1) -> list[Chip]:
    """The devices of a slice, so many on a chip, the last axis the fastest; three coordinates."""
    return [Chip((*place, *(0,) * (3 - len(sizes))))
            for place in itertools.product(*map(range, sizes)) for _ in range(cores)]


def slice_of_links(sizes: tuple[int, ...], rings: Sequence[bool] | None = None,
                   link: float = 1.0) -> Torus:
    """Its links, of so many bytes a second; every axis is a ring, or those that are named."""
    places = tuple(chip.coords[:len(sizes)] for chip in chips(*sizes))
    return Torus(sizes, tuple(rings or (True,) * len(sizes)), link, places)
