"""What the devices of a compiled program say to each other: kinds, sizes, how often."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from engram_jax.costs.hlo import Computation, Instruction, Program, Shape, bytes_of, parse

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")


Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      shapes: (dtype, dimensions) of what a device puts in.
      bytes: of `shapes`, each time.
      times: how often it runs in one call, as `hlo.Site` has it.
      exact: as `hlo.Site` has it.
      groups: which devices take part together, by their numbers in the program; () means all. Of a
        collective-permute who sends to whom.
      source: the operation of the model that it came from, if the compiler kept that.
      overlaps: it is started in one place and waited for in another, so other work may go on.
    """

    kind: str
    shapes: tuple[Shape, ...]
    bytes: int
    times: int
    exact: bool
    groups: Groups
    source: str
    overlaps: bool = False


def collectives(program: Any) -> list[Collective]:
    """Every collective of a program, in the order of the text.

    Args:
      program: a compiled program (`.as_text()`), its text, or a parsed `Program`.
    """
    if not isinstance(program, Program):
        program = parse(program if isinstance(program, str) else program.as_text())
    calls: list[Collective] = []
    begun = _begun(program)
    cut = _fused(program) - begun if begun else set()
    counted: set[str] = set()  # computations that are the inside of a collective
    started: set[str] = set()  # computations that run beside others
    for site in program.walk():
        instruction, computation = site.instruction, site.computation
        if instruction.opcode == "async-start":
            started.update(instruction.called)
        kind = _kind(program, instruction)
        if kind is None or computation.name in counted:
            continue
        if computation.name in cut:
            continue  # goes on beside other work, or is waited for
        counted.update(instruction.called)
        sent = _sent(computation, instruction)
        calls.append(Collective(
            kind=kind, shapes=sent, bytes=sum(map(bytes_of, sent)), times=site.times,
            exact=site.exact, groups=_groups(program, instruction),
            source=instruction.attribute(r'op_name="([^"]*)"') or "",
            overlaps=(instruction.opcode.endswith("-start") or computation.name in started
                      or computation.name in begun)))
    return calls


def _begun(program: Program) -> set[str]:
    """The fusions in which a TPU begins a collective.

    libtpu cuts such a collective into several fusions, others of which have products in them, and
    each holds the whole instruction again. Where it cuts any, what is not cut stands in no fusion.
    """
    return {computation.name for computation in program.computations.values()
            if any('"AsyncCollectiveStart"' in part.attributes
                   for part in computation.instructions.values())}


def _fused(program: Program) -> set[str]:
    return {name for computation in program.computations.values()
            for part in computation.instructions.values() if part.opcode == "fusion"
            for name in part.called}


def by_kind(calls: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """For each kind that occurs: `count` and `bytes` (per device, over all the times that they
    run) and `largest_bytes` (of one)."""
    totals: dict[str, collections.Counter[str]] = {}
    for one in calls:
        total = totals.setdefault(one.kind, collections.Counter())
        total["count"] += one.times
        total["bytes"] += one.times * one.bytes
        total["largest_bytes"] = max(total["largest_bytes"], one.bytes)
    return {kind: dict(totals[kind]) for kind in KINDS if kind in totals}


def _kind(program: Program, instruction: Instruction) -> str | None:
    """The kind of a collective; an asynchronous one counts where it starts.

    A generic `async-start` is no collective: the one that it wraps is found in its computation.
    """
    name = instruction.opcode.removesuffix("-start")
    if name in KINDS:
        return name
    return "reduce-scatter" if _reduced_in_fusion(program, instruction) else None


def _reduced_in_fusion(program: Program, instruction: Instruction) -> Instruction | None:
    """The all-reduce in a TPU fusion of which each device keeps a slice."""
    if instruction.opcode != "fusion" or "kind=kCustom" not in instruction.attributes:
        return None
    for name in instruction.called:
        parts = {part.opcode: part for part in program.computations[name].instructions.values()}
        if "dynamic-slice" in parts and "all-reduce" in parts:
            return parts["all-reduce"]
    return None


def _sent(computation: Computation, instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays that a device puts in.

    Operands by their names; where the text has not defined them, what the result tells: an
    asynchronous start's tuple begins with its operand.
    """
    if known := computation.operand_shapes(instruction):
        return known
    if instruction.operands and instruction.opcode.endswith("-start"):
        return instruction.shapes[:1]
    return instruction.shapes


def _groups(program: Program, instruction: Instruction) -> Groups:
    """Replica groups: `{{0,1},{2,3}}`; `[4,2]<=[2,4]T(1,0)`, numbers in an array of 2 x 4 that is
    transposed and cut into 4 groups of 2; or `mesh['data'=2,'fsdp'=4] {'fsdp'}`, along an axis."""
    text = (_reduced_in_fusion(program, instruction) or instruction).attributes
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
        return tuple(map(_numbers, re.findall(r"\{([\d,]+)\}", listed[1])))
    if iota := re.search(r"replica_groups=\[(\d+),[\d,]+\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        numbers = np.arange(math.prod(_numbers(iota[2]))).reshape(_numbers(iota[2]))
        turned = numbers.transpose(_numbers(iota[3])) if iota[3] else numbers
        return _rows(turned.reshape(int(iota[1]), -1))
    if named := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", text):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        own = [names.index(name) for name in re.findall(r"'(\w+)'", named[2])]
        last = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), own, range(-len(own), 0))
        return _rows(last.reshape(-1, math.prod(sizes[axis] for axis in own)))
    return ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _rows(numbers: np.ndarray) -> Groups:
    return tuple(map(tuple, numbers.tolist()))
