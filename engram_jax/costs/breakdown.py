"""Where the time of a compiled step goes: by part of the network, by kind of work, on the wire.

Parts are the names that the code gives with `jax.named_scope`; the compiler carries them into the
program, through gradients and fusions. Nothing here has been compared with a running TPU.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from engram_jax.costs.collectives import Collective
from engram_jax.costs.compiled import KERNEL, flops_of, timed
from engram_jax.costs.hlo import Program, Site

OTHER = "other"
# Named scopes, as the code has them. Where scopes are nested, an operation is the innermost's.
SCOPES = ("hash", "lookup", "combine", "row_update", "embedding", "attention", "experts", "ffn",
          "hyper_connections", "fusion", "norm", "head", "loss", "gather_weights", "optimizer")
_COPIES = ("copy", "transpose", "bitcast", "copy-start", "dynamic-slice", "dynamic-update-slice",
           "concatenate", "pad", "slice", "reshape")


@dataclasses.dataclass
class Part:
    """What one part of the network takes of a device's step.

    Attributes:
      seconds: of computing, as the compiler estimates it.
      flops: of its matrix products, recomputation included.
      sent_bytes: that its collectives are given.
    """

    seconds: float = 0.0
    flops: int = 0
    sent_bytes: int = 0


def scope_of(op_name: str) -> str:
    """The innermost scope in an operation's name, such as "jit(step)/transpose(jvp(head))/dot"."""
    names = [name for name in re.findall(r"[^/()]+", op_name) if name in SCOPES]
    return names[-1] if names else OTHER


def by_scope(
    program: Program, collectives: Iterable[Collective], clock: float, peak_flops: float
) -> dict[str, Part]:
    """For each scope that occurs what it takes, those that take longest first.

    Args:
      program: compiled.
      collectives: of the program.
      clock, peak_flops: as `compiled.timed` takes them.
    """
    parts: dict[str, Part] = collections.defaultdict(Part)
    for site, seconds in timed(program, clock, peak_flops):
        parts[_scope(site)].seconds += seconds
    for site in program.walk():
        if operations := flops_of(site):
            parts[_scope(site)].flops += operations * site.times
    for one in collectives:
        parts[scope_of(one.source)].sent_bytes += one.bytes * one.times
    return dict(sorted(parts.items(), key=lambda item: (-item[1].seconds, item[0])))


def _scope(site: Site) -> str:
    return scope_of(site.instruction.attribute(r'op_name="([^"]*)"') or "")


def by_kind(program: Program, clock: float, peak_flops: float) -> dict[str, float]:
    """Seconds of matrix products, kernels, copies, and all else, which memory bounds."""
    products = {site.computation.name for site in program.walk()
                if site.instruction.opcode in ("dot", "convolution")}
    kinds = dict.fromkeys(("matrix products", "kernels", "copies", "memory-bound"), 0.0)
    for site, seconds in timed(program, clock, peak_flops):
        kinds[_kind(site, products)] += seconds
    return kinds


def _kind(site: Site, products: set[str]) -> str:
    instruction = site.instruction
    if instruction.opcode == "custom-call" and KERNEL in instruction.attributes:
        return "kernels"
    if flops_of(site) or products & set(instruction.called):
        return "matrix products"
    return "copies" if instruction.opcode in _COPIES else "memory-bound"


# --- On the wire ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torus:
    """The links of a slice.

    Attributes:
      sizes: chips along each axis.
      link: bytes a second over one link in one direction; a chip has two links an axis.
    """

    sizes: Sequence[int]
    link: float

    def seconds(self, one: Collective) -> float:
        """The time of one collective each time that it runs, by its bytes over the links alone.

        All groups talk at once and use both directions of every axis that a group spans. Gathers
        and scatters pass each byte on from chip to chip; what goes from all to all crosses a
        quarter of its axis on average.
        """
        group = one.group or math.prod(self.sizes)
        if group <= 1:
            return 0.0
        spanned = self._spanned(group)
        width, rest = 2 * self.link * spanned, (group - 1) / group
        if one.kind == "all-gather":
            return one.bytes * (group - 1) / width
        if one.kind == "all-reduce":
            return 2 * one.bytes * rest / width
        if one.kind in ("all-to-all", "ragged-all-to-all"):
            hops = group ** (1 / spanned) / 4
            return one.bytes * rest * hops * spanned / width
        if one.kind == "reduce-scatter":
            return one.bytes * rest / width
        return one.bytes / self.link

    def _spanned(self, group: int) -> int:
        """How many axes a group of devices spans at least."""
        reach, axes = 1, 0
        for size in sorted(self.sizes, reverse=True):
            if reach >= group:
                break
            reach, axes = reach * size, axes + 1
        return max(axes, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """One step of a device by computing and by what it says to others.

    Attributes:
      compute_s: as the compiler estimates it.
      collective_s: of all collectives, each alone on the links.
      overlapping_s: of those, what is started early enough that computing may hide it.
      step_s: computing, what cannot be hidden, and what overlaps beyond the computing.
      mfu: the model's FLOPs over what the chip could do in that time.
    """

    compute_s: float
    collective_s: float
    overlapping_s: float
    step_s: float
    mfu: float


def roofline(
    compute_s: float, collectives: Iterable[Collective], torus: Torus, model_flops: float,
    peak_flops: float,
) -> Roofline:
    """The time of a step, and the model FLOPs utilisation that it comes to.

    Args:
      compute_s: seconds of computing.
      collectives: of the program; one in a loop whose trips depend on data counts once.
      torus: the slice.
      model_flops: of a device's share of the step, nothing recomputed.
      peak_flops: of the chip, FLOPs a second.
    """
    hidden = shown = 0.0
    for one in collectives:
        seconds = torus.seconds(one) * one.times
        hidden, shown = hidden + seconds * one.overlaps, shown + seconds * (not one.overlaps)
    step_s = shown + max(compute_s, hidden)
    return Roofline(compute_s=compute_s, collective_s=hidden + shown, overlapping_s=hidden,
                    step_s=step_s, mfu=model_flops / peak_flops / step_s)
