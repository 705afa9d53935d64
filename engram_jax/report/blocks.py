"""What a page is made of: sections of blocks, which the template draws by `kind`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from engram_jax.report.looks import Key, Look


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """A plotly figure.

    Attributes:
      title: above it, plain text.
      figure: its JSON value.
      height: pixels.
      keys: names beside it; pressing one hides what is drawn for it.
      note: below it.
      half: it may stand beside another plot where there is room.
    """

    kind: ClassVar[str] = "plot"
    title: str
    figure: Mapping[str, Any]
    height: int = 320
    keys: Sequence[Key] = ()
    note: str = ""
    half: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table; `bar` is a share of the cell that is shaded, `look` a swatch before it,
    `small` a second line, `chips` pieces of text, each in a frame."""

    text: str
    small: str = ""
    bar: float | None = None
    look: Look | None = None
    chips: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
      title: above it.
      head: names of the columns; one that begins with "#" holds numbers (the sign is not shown).
      rows: cells, or texts.
      code: its cells hold pieces of text.
      half: it may stand beside another where there is room.
    """

    kind: ClassVar[str] = "table"
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""
    code: bool = False
    half: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Texts whose tokens are shaded by a gate that the reader chooses.

    Attributes:
      pieces: what each token shows, of each text.
      gates: arm -> layer -> for each text, for each token its gates, one a branch.
      chosen: the arm that is shown first.
    """

    kind: ClassVar[str] = "tokens"
    title: str
    pieces: Sequence[Sequence[str]]
    gates: Mapping[str, Mapping[str, Sequence[Sequence[Sequence[float]]]]]
    chosen: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """A few large numbers with what they are: (number, words)."""

    kind: ClassVar[str] = "numbers"
    numbers: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded:
    """Verbatim text under a title that opens it."""

    kind: ClassVar[str] = "folded"
    title: str
    texts: Sequence[tuple[str, str]]  # (what it is, the text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Tables under a title that opens them."""

    kind: ClassVar[str] = "group"
    title: str
    blocks: Sequence[Table]


Block = Plot | Table | Tokens | Numbers | Folded | Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page.

    Attributes:
      name: of its anchor.
      title: over it.
      reading: what one sees and how to read it, a sentence or two.
      blocks: what it holds.
      keys: names of what its plots draw, where they share them; pressing one hides it in all.
      missing: what is not there and why, a line each.
    """

    name: str
    title: str
    reading: str
    blocks: Sequence[Block]
    keys: Sequence[Key] = ()
    missing: Sequence[str] = ()
