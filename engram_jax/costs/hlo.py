"""The text of a compiled program as computations and instructions, with how often each runs.

XLA's own cost analysis counts the body of a loop once; a model whose blocks are a scan is then
thirty times too cheap. Here every instruction has the product of the trip counts around it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

Shape = tuple[str, tuple[int, ...]]  # dtype, dimensions

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,<=]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|true_computation|"
                     r"false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_CONTINUED = re.compile(r'\n(?="|}})')  # what a Pallas kernel is told stands on lines of its own
_FORWARDED = ("copy", "copy-start", "copy-done", "bitcast", "get-tuple-element", "convert")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str  # what stands between the parentheses
    root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result, in order; one unless it is a tuple."""
        return shapes(self.type)

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs (a loop's condition is left out)."""
        return tuple(name for group in _CALLED.findall(self.attributes)
                     for name in _OPERAND.findall(group))


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction]

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        """The arrays that an instruction reads."""
        return tuple(shape for name in instruction.operands if name in self.instructions
                     for shape in self.instructions[name].shapes)


@dataclasses.dataclass(frozen=True)
class Site:
    """An instruction where it stands.

    Attributes:
      computation: that it is written in.
      times: how often a device runs it in one call of the program, as far as is known.
      exact: false in a branch of a conditional and in a loop whose trip count nobody knows; either
        is counted once.
    """

    instruction: Instruction
    computation: Computation
    times: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def walk(self) -> Iterator[Site]:
        """Every instruction that runs, fusions and loop bodies included.

        A branch of a conditional counts once, as a loop does whose trips depend on data.
        """
        yield from self._walk(self.entry, 1, True)

    def _walk(self, name: str, times: int, exact: bool) -> Iterator[Site]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Site(instruction, computation, times, exact)
            trips: int | None = None if instruction.opcode == "conditional" else 1
            if instruction.opcode == "while":
                trips = self.trips(computation, instruction)
            for called in instruction.called:
                if called in self.computations:
                    yield from self._walk(called, times * (1 if trips is None else trips),
                                          exact and trips is not None)

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop runs; None where that depends on data.

        It is written beside the loop (CPU, GPU), or the loop counts by ones up to a constant (TPU).
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        name = _CONDITION.search(loop.attributes)
        condition = self.computations.get(name[1]) if name else None
        if condition is None:
            return None
        root = next(i for i in condition.instructions.values() if i.root)
        if root.opcode != "compare" or root.attribute(r"direction=(\w+)") != "LT":
            return None
        counter, stop = (condition.instructions[operand] for operand in root.operands)
        index = counter.attribute(r"index=(\d+)")
        start = self._carried(computation, loop, int(index)) if index else None
        if stop.opcode != "constant" or start is None:
            return None
        return max(0, int(stop.literal) - start)

    def _carried(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        """The constant that a loop's carry starts with at an index."""
        carry = computation.instructions[loop.operands[0]]
        if carry.opcode != "tuple":
            return None
        origin = computation.instructions[carry.operands[index]]
        while origin.opcode in _FORWARDED and origin.operands[0] in computation.instructions:
            origin = computation.instructions[origin.operands[0]]
        return int(origin.literal) if origin.opcode == "constant" else None


def parse(text: str) -> Program:
    """The program behind `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _CONTINUED.sub("", text).splitlines():
        if current is None or not line.startswith(" "):
            if (header := _HEADER.match(line)) and not line.startswith("HloModule"):
                current = Computation(header[1], {})
                computations[current.name] = current
                entry = current.name if line.startswith("ENTRY") else entry
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError(f"text of {len(text)} characters: has no ENTRY computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if start is None:
        return None
    rest = line[start.end():]
    stop = _closing(rest) if rest.startswith("(") else rest.find(" ")
    opcode, _, tail = rest[stop:].strip().partition("(")
    end = _closing("(" + tail) - 1
    literal = tail[:max(end - 1, 0)]
    return Instruction(
        name=start[2], type=rest[:stop], opcode=opcode, literal=literal,
        operands=tuple(_OPERAND.findall(literal)), attributes=tail[end:], root=bool(start[1]))


def _closing(text: str) -> int:
    """One past the parenthesis that closes the one that `text` begins with."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return at + 1
    return len(text)


def shapes(type_text: str) -> tuple[Shape, ...]:
    """The arrays of a type, `f32[8,16]{1,0:T(8,128)}` or a tuple of such."""
    return tuple((dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
                 for dtype, dims in _ARRAY.findall(type_text))


def bytes_of(shape: Shape) -> int:
    """Bytes of an array, layout's padding left out."""
    dtype, dims = shape
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return -(-math.prod(dims) * bits // 8)
