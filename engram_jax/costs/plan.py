"""Will it fit? The real train step compiled for TPUs that are not there (`engram-jax plan`).

libtpu compiles for a described slice ("v5p:4x4x4") on any machine; what it says of memory is what
the slice would say. Nothing runs. No tokenizer is fetched: the hash is compiled with a vocabulary
that is not compressed (`CompressedVocabulary.identity`), which changes constants, not shapes.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import RunConfig, require
from engram_jax.costs.collectives import by_kind, collectives
from engram_jax.costs.compiled import flops, seconds
from engram_jax.costs.hlo import parse
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.settings import json_text
from engram_jax.training import placement
from engram_jax.training.fsdp import AXES
from engram_jax.training.step import train_step

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU device as jax sees it.

    Attributes:
      hbm_gib: what libtpu 0.0.42 lets a program have ("exceeds available HBM (15.75G)"); the chip
        has a little more (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm: 32, 16, 95,
        32 and 192 GiB a chip, and two devices a chip on tpu7x).
      peak_teraflops: bfloat16, same source.
      axes, most: of a slice's layout, and how many chips one may have (same source).
      clock_ghz: the peak over the multiplications and additions that its matrix units do in a
        cycle; turns the compiler's cycles into seconds.
      options: what libtpu needs to be told beside the slice's name.
    """

    hbm_gib: float
    peak_teraflops: float
    clock_ghz: float
    axes: int
    most: int
    options: tuple[tuple[str, Any], ...] = ()


CHIPS = {
    "v4": Chip(hbm_gib=30.75, peak_teraflops=275, clock_ghz=1.05, axes=3, most=4096,
               options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(hbm_gib=15.75, peak_teraflops=197, clock_ghz=1.5, axes=2, most=256),
    "v5p": Chip(hbm_gib=95.74, peak_teraflops=459, clock_ghz=1.75, axes=3, most=8960),
    "v6e": Chip(hbm_gib=31.25, peak_teraflops=918, clock_ghz=1.75, axes=2, most=256),
    "tpu7x": Chip(hbm_gib=94.75, peak_teraflops=1153.5, clock_ghz=2.2, axes=3,
                  most=9216),
}

# libtpu asks the cloud about the machine that it is on, and logs that there is none. Two programs
# may compile at a time: neither touches a device.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled", "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the compiler says of a run on a slice. Everything is of one device and one step.

    Attributes:
      devices: of the slice, `mesh` (data x fsdp) of them.
      hbm_bytes: that a program may use.
      argument_bytes: state and batch.
      temporary_bytes: activations, gradients, gathered weights; None where it does not fit.
      peak_bytes: what is alive at once, the program included; where it does not fit, what the
        compiler asked for, None if it did not say.
      flops: matrix products, recomputation included; None where it does not fit, as all below.
      collectives: kind -> count, bytes, largest_bytes (`costs.collectives.by_kind`).
      estimated_s: libtpu's own estimate without collectives (`costs.compiled.seconds`).
      reason: why it does not fit, in the compiler's words.
    """

    name: str
    topology: str
    mesh: str
    devices: int
    hbm_bytes: int
    argument_bytes: int
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    fits: bool = False
    flops: int | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    estimated_s: float | None = None
    compile_s: float
    reason: str = ""

    def to_json(self) -> str:
        return json_text(dataclasses.asdict(self), indent=1)


def plan(run: RunConfig, topology: str, fsdp: int = 0) -> Plan:
    """Compile a step of `run` for a slice.

    Args:
      run: the run.
      topology: chip and layout, for example "v5e:16x16" or "v5p:4x4x4".
      fsdp: devices that parameters are split over; 0 means all.

    Raises:
      UserError: no libtpu, no such slice, or one that does not divide the run.
    """
    chip, devices = slice_of(topology)
    fsdp = fsdp or len(devices)
    require(fsdp >= 1 and len(devices) % fsdp == 0, "fsdp", fsdp,
            f"does not divide the {len(devices)} devices of {topology}")
    mesh = placement.make_mesh(len(devices) // fsdp, fsdp, devices)
    state, batch = _arguments(run, mesh)
    step = train_step(run, address(run.model, _vocabulary(run), 0), mesh)
    common: dict[str, Any] = {
        "name": run.name, "topology": topology, "mesh": placement.shape_of(mesh),
        "devices": mesh.size, "hbm_bytes": int(chip.hbm_gib * GIB),
        "argument_bytes": _bytes_of_a_device((state, batch))}
    start = time.perf_counter()
    try:
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(**common, compile_s=time.perf_counter() - start, reason=_reason(str(error)),
                    peak_bytes=asked_for(str(error)))
    return Plan(**{**common, **_said(compiled, chip)}, compile_s=time.perf_counter() - start)


def slice_of(topology: str) -> tuple[Chip, list[jax.Device]]:
    """The devices of a slice that need not exist.

    Raises:
      UserError: no libtpu, or no such slice.
    """
    name, _, layout = topology.partition(":")
    require(name in CHIPS and re.fullmatch(r"\d+(x\d+)*", layout) is not None, "topology", topology,
            f"must be a chip ({', '.join(CHIPS)}) and its layout, for example v5p:4x4x4")
    chip, sizes = CHIPS[name], [int(size) for size in layout.split("x")]
    require(len(sizes) == chip.axes and 1 <= math.prod(sizes) <= chip.most, "topology", topology,
            f"there is no such slice: one of {name} has {chip.axes} axes and at most {chip.most} "
            "chips")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan needs libtpu, the compiler for TPUs: pip install 'engram_jax[aot]'")
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # or else jax looks for a TPU to run on
    options = dict(chip.options)
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(topology, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology = {topology!r}: there is no such slice: {error}") from error
    return chip, found.devices


def _vocabulary(run: RunConfig) -> CompressedVocabulary:
    return CompressedVocabulary.identity(run.model.vocab_size)


def _arguments(run: RunConfig, mesh: Mesh) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """State and batch as shapes that know where they lie."""
    shape = run.data.batch_size, run.data.sequence_length
    split = NamedSharding(mesh, PartitionSpec(AXES))
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in (
        ("tokens_BT", jnp.int32), ("targets_BT", jnp.int32), ("starts_BT", jnp.bool))}
    placement.check(run, mesh)
    return placement.placed_state(run, mesh), batch


def _bytes_of_a_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def _said(compiled: Any, chip: Chip) -> dict[str, Any]:
    """What a compiled program tells about itself."""
    memory, program = compiled.memory_analysis(), parse(compiled.as_text())
    # What is alive at once. It is by this that libtpu refuses a program: one whose arguments and
    # temporaries add up to 17.1 GiB compiled for 15.75 GiB, at a peak of 15.47; the next, at 15.80,
    # was refused with that number.
    peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "fits": peak <= chip.hbm_gib * GIB,
        "flops": flops(program),
        "collectives": by_kind(collectives(program)),
        "estimated_s": seconds(program, chip.clock_ghz * 1e9, chip.peak_teraflops * 1e12),
    }


def asked_for(message: str) -> int | None:
    """The bytes that a program would have needed, from the compiler's refusal."""
    for pattern in (r"Total hbm usage >= ([\d.]+)([KMGT])", r"Used ([\d.]+)([KMGT]) of",
                    r"\(([\d.]+)([KMGT])\) exceeds available HBM"):
        if found := re.search(pattern, message):
            return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
    return None


def _reason(message: str) -> str:
    """The compiler's first sentence."""
    first = message.removeprefix("RESOURCE_EXHAUSTED: ").strip().splitlines()[0]
    return first[:300]


def described(found: Plan) -> str:
    """The plan as a table for people."""
    lines = [
        f"{found.name} on {found.topology}: {found.devices} devices, mesh data x fsdp "
        f"{found.mesh}; of each device, in one step:",
        "",
        _line("arguments (state and batch)", _gib(found.argument_bytes)),
        _line("temporaries", _gib(found.temporary_bytes)),
        _line("peak", _gib(found.peak_bytes)),
        _line("HBM", _gib(found.hbm_bytes)),
        _line("fits", "yes" if found.fits else f"no: {found.reason}" if found.reason else "no"),
    ]
    if found.flops is not None:
        lines += [_line("FLOPs (recomputation included)", f"{found.flops:.4g}"),
                  _line("estimated time, collectives aside", f"{found.estimated_s:.4g} s")]
    for kind, total in found.collectives.items():
        lines.append(_line(kind, f"{total['count']:,} of {_gib(total['bytes'])} together, the "
                                 f"largest {_gib(total['largest_bytes'])}"))
    return "\n".join([*lines, _line("compiled in", f"{found.compile_s:.0f} s")])


def _line(what: str, value: str) -> str:
    return f"  {what:<36}{value}"


def _gib(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / GIB:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.3g} MiB"
