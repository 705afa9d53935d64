"""FLOPs and the compiler's own estimate of time of a compiled TPU program, loops multiplied out."""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from engram_jax.costs.hlo import Program, Shape, Site, bytes_of

KERNEL = "tpu_custom_call"
UNKNOWN_CYCLES = 10**12  # a number like 2**63 stands where libtpu could not tell


def flops(program: Program) -> int:
    """Floating-point operations of a device in one call: matrix products, two for each term.

    Counts `dot`, `convolution` (which is what TPUs make of a dot) and the kernels of ragged_dot and
    splash attention; other kernels and elementwise work are left out.
    """
    return sum(flops_of(site) * site.times for site in program.walk())


class Speed(NamedTuple):
    """What a device does in a second: `cycles`, `flops` of bfloat16, `bytes` from and to memory."""

    cycles: float
    flops: float
    bytes: float


def timed(program: Program, speed: Speed) -> Iterator[tuple[Site, float]]:
    """Every instruction that takes time by itself, with the seconds of all the times that it runs.

    As libtpu estimates it, without collectives: the `estimated_cycles` that it writes beside each
    operation, over the clock. It writes none beside kernels, which count at the peak, none beside
    gathers and scatters that it gives to SparseCores (v5p has them), which count at the bandwidth
    of memory, though something else may run meanwhile, and none beside collectives and copies,
    which it means to hide behind the rest. (`cost_analysis()['optimal_seconds']` is of no use here:
    it counts a loop once, and -1 s for each kernel.)

    Args:
      program: compiled for TPUs.
      speed: of the chip.
    """
    fused = {name for site in program.walk() if site.instruction.opcode == "fusion"
             for name in site.instruction.called}
    for site in program.walk():
        if site.computation.name in fused:
            continue
        cycles = site.instruction.attribute(r'"estimated_cycles":"(\d+)"')
        if cycles and int(cycles) < UNKNOWN_CYCLES:
            yield site, int(cycles) / speed.cycles * site.times
        elif site.instruction.opcode == "custom-call":
            yield site, flops_of(site) / speed.flops * site.times
        elif on_sparse_cores(site):
            yield site, _moved(site) / speed.bytes * site.times


def seconds(program: Program, speed: Speed) -> float:
    """The sum of `timed`."""
    return sum(seconds for _, seconds in timed(program, speed))


def on_sparse_cores(site: Site) -> bool:
    """Is it a gather or scatter that libtpu gives to SparseCores?"""
    return site.instruction.opcode == "fusion" and "_offload_custom_fusion" in site.instruction.name


def _moved(site: Site) -> int:
    """Bytes that a gather or scatter reads and writes. Its first operand is the array whose rows it
    reads or adds to, the others say which rows and what is added."""
    _, *others = site.computation.operand_shapes(site.instruction)
    if site.instruction.name.startswith("gather"):
        return 2 * bytes_of(site.instruction.shapes[0]) + sum(map(bytes_of, others))
    indices, *updates = others
    return bytes_of(indices) + 3 * sum(map(bytes_of, updates))


def flops_of(site: Site) -> int:
    """Floating-point operations of an instruction, each time that it runs; as `flops` counts."""
    count = _COUNTS.get(site.instruction.opcode)
    return count(site) if count else 0


def _dot(site: Site) -> int:
    left = site.computation.operand_shapes(site.instruction)[0][1]
    axes = site.instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    summed = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
    return 2 * summed * math.prod(site.instruction.shapes[0][1])


def _convolution(site: Site) -> int:
    """Only taps that meet an element count: a batch axis is a dilated window here."""
    left, right = (shape[1] for shape in site.computation.operand_shapes(site.instruction))
    labels = site.instruction.attribute(r"dim_labels=(\w+->\w+)") or ""
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    out = site.instruction.shapes[0][1]
    groups = int(site.instruction.attribute(r"batch_group_count=(\d+)") or 1)
    terms = (left[left_labels.index("b")] // groups * right[right_labels.index("i")]
             * right[right_labels.index("o")])
    spatial = sorted(label for label in out_labels if label.isdigit())
    window = _window(site.instruction.attribute(r"window=\{([^}]*)\}") or "", len(spatial))
    for label, settings in zip(spatial, window, strict=True):
        terms *= _taps(left[left_labels.index(label)], out[out_labels.index(label)], *settings)
    return 2 * terms


def _window(text: str, rank: int) -> list[tuple[int, int, int, int, int]]:
    """size, stride, low padding, lhs_dilate, rhs_dilate of each spatial axis."""
    fields = dict(re.findall(r"(\w+)=(\S+)", text))

    def of(name: str, default: int) -> list[int]:
        return [int(part.split("_")[0]) for part in fields[name].split("x")
                ] if name in fields else [default] * rank

    return list(zip(of("size", 1), of("stride", 1), of("pad", 0), of("lhs_dilate", 1),
                    of("rhs_dilate", 1), strict=True))


def _taps(
    size: int, out: int, window: int, stride: int, low: int, dilation: int, spread: int
) -> int:
    """Pairs of an output and a tap of the window that meet an element of the input."""
    if window == 1 and stride == 1 and dilation == 1 and low == 0:
        return out
    last = (size - 1) * dilation
    return sum(1 for at in range(out) for tap in range(window)
               if 0 <= (position := at * stride + tap * spread - low) <= last
               and position % dilation == 0)


def _ragged(site: Site) -> int:
    """Every slot times one expert's matrix, whichever of the three arrays is the experts'."""
    if KERNEL not in site.instruction.attributes or "ragged-dot" not in site.instruction.name:
        return 0
    arrays: list[Shape] = [*site.computation.operand_shapes(site.instruction),
                           *site.instruction.shapes]
    experts = [dims for _, dims in arrays if len(dims) == 3]
    slots = [dims for _, dims in arrays if len(dims) == 2]
    return 2 * max(dims[0] for dims in slots) * math.prod(experts[0][1:]) if experts else 0


def _splash(site: Site) -> int:
    """The products of queries, keys and values in the blocks that causal attention visits.

    The first operand says for each block of queries and of keys what comes next; then come queries
    and keys [..., H, T, X] and values [..., H, T, V].
    """
    kernel = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", site.instruction.name)
    if kernel is None:
        return 0
    arrays = [dims for _, dims in site.computation.operand_shapes(site.instruction)]
    (*heads, time, width), (*_, wide) = [
        dims for dims in arrays if len(dims) >= 3 and dims[-2:] != arrays[0][-2:]][:3:2]
    of_keys, of_values = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}[kernel[1]]
    blocks = arrays[0][-2]
    pairs = time * time * (blocks + 1) // (2 * blocks)
    return 2 * math.prod(heads) * pairs * (of_keys * width + of_values * wide)


def _kernel(site: Site) -> int:
    return _ragged(site) or _splash(site)


_COUNTS: dict[str, Callable[[Site], int]] = {
    "dot": _dot, "convolution": _convolution, "custom-call": _kernel}
