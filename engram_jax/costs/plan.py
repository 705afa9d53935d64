"""Will it fit? The real train step compiled for TPUs that are not there (`engram-jax plan`).

libtpu compiles for a described slice ("v5p:4x4x4") on any machine; what it says of memory is what
the slice would say. Nothing runs. No tokenizer is fetched: the hash is compiled with a vocabulary
that is not compressed (`CompressedVocabulary.identity`), which changes constants, not shapes.
"""

import dataclasses
import re
import textwrap
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from engram_jax.config import RunConfig, require
from engram_jax.costs import breakdown, depths, sharing
from engram_jax.costs.accounting import account
from engram_jax.costs.breakdown import Costs
from engram_jax.costs.collectives import KINDS, collectives
from engram_jax.costs.compiled import Speed
from engram_jax.costs.hlo import Program, parse
from engram_jax.costs.slices import Chip, Slice, slice_of
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.settings import json_text
from engram_jax.training import fitting, placement
from engram_jax.training.fsdp import BATCH
from engram_jax.training.step import train_step

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the compiler says of a run on a slice. Everything is of one device and one step.

    Rounds that follow where a capacity is short are not counted (`costs.breakdown.costs`).

    Attributes:
      devices: of the slice, `mesh` (data x fsdp, x expert where experts are shared) of them.
      experts: how tokens and experts come together, and why; "" without experts.
      accumulate, remat: `training.accumulate` and `model.remat`, as the run names them or as they
        fit by the guess of `training.fitting`.
      depth: blocks that were compiled; the rest is multiplied out. 0 is all of them.
      hbm_bytes: that a program may use.
      argument_bytes: state and batch.
      temporary_bytes: activations, gradients, gathered weights, as if none took another's place;
        None where it does not fit, and of a few blocks, as it is no line in their number.
      peak_bytes: what is alive at once, the program included; where it does not fit, what the
        compiler asked for, None if it did not say.
      squares: arrays of the program with two axes as long as a sequence, such as all scores are.
      flops: matrix products, recomputation included; None where it does not fit, as all below.
      collectives: kind -> count, bytes, largest_bytes (of one).
      model_flops: of a device's share of the step, nothing recomputed (`costs.accounting`).
      compute_s: libtpu's own estimate without collectives (`costs.compiled.timed`).
      collective_s, overlapping_s: of all collectives by their bytes over the slice's links, and of
        those that computing may hide.
      step_s, mfu: the step's time by both, and the model's FLOPs over what the chip could do in it
        (`costs.breakdown.Roofline`).
      assumed: what these two rest on.
      by_scope: for each part of the network seconds, of these the kinds of `by_kind`, flops,
        sent_bytes and collective_s, and `bytes KIND` of each kind of collective.
      by_kind: seconds of matrix products, kernels, copies, what SparseCores do and what memory
        bounds.
      reason: why it does not fit, in the compiler's words.
    """

    name: str
    topology: str
    mesh: str
    devices: int
    experts: str = ""
    accumulate: int = 1
    remat: str = ""
    depth: int = 0
    hbm_bytes: int
    argument_bytes: int
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    fits: bool = False
    squares: int | None = None
    flops: int | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    model_flops: float | None = None
    compute_s: float | None = None
    collective_s: float | None = None
    overlapping_s: float | None = None
    step_s: float | None = None
    mfu: float | None = None
    assumed: str = ""
    by_scope: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    by_kind: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_s: float
    reason: str = ""

    def to_json(self) -> str:
        return json_text(dataclasses.asdict(self), indent=1)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one compiled program says; None for what a refused one does not.

    Attributes:
      given_bytes: of state and batch, without what layouts add.
      argument_bytes, temporary_bytes, peak_bytes: as `Plan` has them.
      costs: of its parts.
      largest: of each kind of collective the bytes of the largest.
      squares: as `Plan` has it.
      reason: why it was refused, or "".
    """

    given_bytes: int
    argument_bytes: int
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    costs: Costs | None = None
    largest: dict[str, int] = dataclasses.field(default_factory=dict)
    squares: int | None = None
    reason: str = ""


def plan(
    run: RunConfig, topology: str, fsdp: int = 0, depth: int = 0, expert: int = 0,
    sequence: int = 1,
) -> Plan:
    """Compile a step of `run` for a slice.

    Args:
      run: the run.
      topology: chip and layout, for example "v5e:16x16" or "v5p:4x4x4".
      fsdp: devices that parameters are split over; 0 means all, but those of a sequence.
      depth: blocks to compile, of which the rest follows (`costs.depths`); 0 is all.
      expert: devices of those that share the experts; 1 gathers them, 0 takes what is faster by
        the bytes (`costs.sharing`).
      sequence: devices that each sequence is split over.

    Raises:
      UserError: no libtpu, no such slice, or one that does not divide the run; no such depth.
    """
    there = slice_of(topology)
    count = len(there.devices)
    require(sequence >= 1 and count % sequence == 0, "sequence", sequence,
            f"does not divide the {count} devices of {topology}")
    groups = count // sequence
    fsdp = fsdp or groups
    require(fsdp >= 1 and groups % fsdp == 0, "fsdp", fsdp,
            f"does not divide the {groups} devices of {topology}" + " for each stretch of a "
            "sequence" * (sequence > 1))
    require(expert >= 0 and fsdp % max(1, expert) == 0, "expert", expert,
            f"does not divide the {fsdp} devices that parameters are split over")

    def mesh_of(expert: int) -> Mesh:
        return placement.make_mesh(
            groups // fsdp, fsdp // expert, there.devices, expert, sequence)

    memory = int(there.chip.hbm_gib * GIB)
    if expert == 0:
        # What fits depends on it, and it on what fits.
        way = sharing.chosen(fitting.fitted(run, mesh_of(1), memory), there, fsdp)
        expert = 1 if way is None else way.devices
    mesh = mesh_of(expert)
    run = fitting.fitted(run, mesh, memory)
    start = time.perf_counter()
    if depth:
        depths.check(run, depth)
        few, more = (measured(depths.cut(run, blocks), there, mesh)
                     for blocks in (depth, 2 * depth))
        whole = _multiplied(run, mesh, few, more, depth)
    else:
        whole = measured(run, there, mesh)
    common: dict[str, Any] = {
        "name": run.name, "topology": topology, "mesh": placement.shape_of(mesh),
        "devices": mesh.size, "depth": depth,
        "experts": sharing.reason(run, there, fsdp, expert),
        "accumulate": run.training.accumulate, "remat": run.model.remat, "hbm_bytes": memory,
        "compile_s": time.perf_counter() - start}
    model_flops = account(run).flops_per_token * run.data.batch_size * run.data.sequence_length
    return Plan(**common, **_said(whole, there.chip, model_flops / count))


def measured(run: RunConfig, there: Slice, mesh: Mesh) -> Measured:
    """Compile one program, and ask it."""
    state, batch = _arguments(run, mesh)
    given = fitting.bytes_of_a_device((state, batch))
    step = train_step(run, address(run.model, _vocabulary(run), 0), mesh)
    try:
        compiled: Any = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Measured(given, given, peak_bytes=asked_for(str(error)), reason=_reason(str(error)))
    memory, program = compiled.memory_analysis(), parse(compiled.as_text() or "")
    largest: dict[str, int] = {}
    for one in collectives(program):
        largest[one.kind] = max(largest.get(one.kind, 0), one.bytes)
    # What is alive at once. It is by this that libtpu refuses a program: one whose arguments and
    # temporaries add up to 17.1 GiB compiled for 15.75 GiB, at a peak of 15.47; the next, at 15.80,
    # was refused with that number.
    return Measured(
        given, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        breakdown.costs(program, there.torus(mesh.devices.flat), _speed(there.chip)), largest,
        squares(program, run.data.sequence_length))


def _multiplied(
    run: RunConfig, mesh: Mesh, few: Measured, more: Measured, depth: int
) -> Measured:
    """The whole run from `depth` blocks of it and twice as many."""
    given = fitting.bytes_of_a_device(_arguments(run, mesh))
    refused = next((each for each in (few, more) if each.costs is None), None)
    if refused is not None:
        return Measured(given, given, peak_bytes=refused.peak_bytes, reason=refused.reason)
    assert few.costs is not None
    assert more.costs is not None
    times = depths.missing(run, depth)

    def line(what: str) -> int:
        first, second = getattr(few, what), getattr(more, what)
        return int(first + times.blocks * (second - first))

    # What other tables add to the state is known, but for what layouts add to it.
    tables = (given - line("given_bytes")) * few.argument_bytes // few.given_bytes
    return Measured(
        given, line("argument_bytes") + tables, None, line("peak_bytes") + tables,
        breakdown.multiplied(few.costs, more.costs, times.blocks, times.tables, times.fusions),
        {kind: max(few.largest.get(kind, 0), size) for kind, size in more.largest.items()},
        more.squares)


def _vocabulary(run: RunConfig) -> CompressedVocabulary:
    return CompressedVocabulary.identity(run.model.vocab_size)


def _arguments(run: RunConfig, mesh: Mesh) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """State and batch as shapes that know where they lie."""
    shape = run.data.batch_size, run.data.sequence_length
    split = NamedSharding(mesh, BATCH)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in (
        ("tokens_BT", jnp.int32), ("targets_BT", jnp.int32), ("starts_BT", jnp.bool))}
    placement.check(run, mesh)
    return placement.placed_state(run, mesh), batch


def _speed(chip: Chip) -> Speed:
    return Speed(chip.clock_ghz * 1e9, chip.peak_teraflops * 1e12, chip.hbm_gbytes * 1e9)


def squares(program: Program, length: int) -> int:
    """How many arrays of a program, fusions included, have two axes of a length."""
    return sum(dims.count(length) >= 2 for site in program.walk()
               for _, dims in site.instruction.shapes)


def _said(whole: Measured, chip: Chip, model_flops: float) -> dict[str, Any]:
    """What is said of a device's memory and time, as fields of `Plan`."""
    said: dict[str, Any] = {
        "argument_bytes": whole.argument_bytes, "temporary_bytes": whole.temporary_bytes,
        "peak_bytes": whole.peak_bytes, "squares": whole.squares, "reason": whole.reason}
    parts = whole.costs
    if parts is None:
        return said
    assert whole.peak_bytes is not None
    times = breakdown.roofline(parts, model_flops, _speed(chip).flops)
    return {**said, **dataclasses.asdict(times), "model_flops": model_flops,
            "assumed": breakdown.ASSUMED,
            "fits": whole.peak_bytes <= chip.hbm_gib * GIB,
            "flops": round(breakdown.total(parts, "flops")),
            "collectives": {kind: {
                "count": round(breakdown.total(parts, f"count {kind}")),
                "bytes": round(breakdown.total(parts, f"bytes {kind}")),
                "largest_bytes": whole.largest[kind]} for kind in KINDS if kind in whole.largest},
            "by_scope": breakdown.by_scope(parts), "by_kind": breakdown.by_kind(parts)}


def asked_for(message: str) -> int | None:
    """The bytes that a program would have needed, from the compiler's refusal."""
    for pattern in (r"Total hbm usage >= ([\d.]+)([KMGT])", r"Used ([\d.]+)([KMGT]) of",
                    r"\(([\d.]+)([KMGT])\) exceeds available HBM"):
        if size := re.search(pattern, message):
            return int(float(size[1]) * 1024 ** ("KMGT".index(size[2]) + 1))
    return None


def _reason(message: str) -> str:
    """The compiler's first sentence."""
    first = message.removeprefix("RESOURCE_EXHAUSTED: ").strip().splitlines()[0]
    return first[:300]


def described(plan: Plan) -> str:
    """The plan as a table for people."""
    lines = [
        f"{plan.name} on {plan.topology}: {plan.devices} devices, mesh data x fsdp (x expert) "
        f"{plan.mesh}; of each device, in one step:",
        "",
        _line("arguments (state and batch)", _gib(plan.argument_bytes)),
        _line("temporaries", _gib(plan.temporary_bytes)),
        _line("peak", _gib(plan.peak_bytes)),
        _line("HBM", _gib(plan.hbm_bytes)),
        _line("arrays of length x length", "unknown" if plan.squares is None else
              f"{plan.squares or 'none'}"),
        _line("fits", "yes" if plan.fits else f"no: {plan.reason}" if plan.reason else "no"),
    ]
    lines.append(_line("a step in parts, keeping", f"{plan.accumulate}, {plan.remat}"))
    if plan.experts:
        lines.append(_line("experts", plan.experts))
    if plan.depth:
        lines.append(_line("blocks compiled", f"{plan.depth} and {2 * plan.depth}; the rest "
                                              "multiplied out"))
    if plan.flops is not None:
        lines += _times(plan)
    for kind, total in plan.collectives.items():
        lines.append(_line(kind, f"{total['count']:,} of {_gib(total['bytes'])} together, the "
                                 f"largest {_gib(total['largest_bytes'])}"))
    return "\n".join([*lines, _line("compiled in", f"{plan.compile_s:.0f} s")])


def _times(plan: Plan) -> list[str]:
    assert plan.flops is not None
    assert plan.model_flops is not None
    lines = [
        _line("FLOPs (recomputation included)",
              f"{plan.flops:.4g}, {plan.flops / plan.model_flops:.2f} times the model's"),
        _line("computing", f"{plan.compute_s:.4g} s by the compiler's estimate"),
        _line("collectives", f"{plan.collective_s:.4g} s by the links' bandwidth, of which "
                             f"{plan.overlapping_s:.4g} s may hide behind computing"),
        _line("a step", f"{plan.step_s:.4g} s, MFU {plan.mfu:.1%}, estimated:"),
        *textwrap.wrap(plan.assumed, 96, initial_indent="    ", subsequent_indent="    "),
        *(_line(f"  {kind}", f"{seconds:.4g} s") for kind, seconds in plan.by_kind.items()),
        "",
        f"  {'part':<20}{'seconds':>12}{'FLOPs':>12}{'sent':>14}{'on the wire':>14}",
    ]
    return [*lines, *(f"  {name:<20}{part['seconds']:>12.4g}{part['flops']:>12.3g}"
                      f"{_gib(int(part['sent_bytes'])):>14}{part['collective_s']:>12.4g} s"
                      for name, part in plan.by_scope.items()), ""]


def _line(what: str, value: str) -> str:
    return f"  {what:<36}{value}"


def _gib(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / GIB:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.3g} MiB"
