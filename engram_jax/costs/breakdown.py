"""Where the time of a compiled step goes: by part of the network, by kind of work, on the wire.

Parts are the names that the code gives with `jax.named_scope`; the compiler carries them into the
program, through gradients and fusions. Nothing here has been compared with a running TPU.
"""

import collections
import dataclasses
import re

from engram_jax.costs.collectives import KINDS, collectives
from engram_jax.costs.compiled import KERNEL, Speed, flops_of, on_sparse_cores, timed
from engram_jax.costs.hlo import Program, Site
from engram_jax.costs.torus import Torus

OTHER = "other"
# Named scopes, as the code has them; an operation is the innermost's.
OF_TABLES = ("hash", "lookup", "check_exchange", "combine", "row_update")
OF_FUSIONS = ("fusion", "gate", "convolution")
SCOPES = (*OF_TABLES, *OF_FUSIONS, "embed", "over_encoding", "attention", "experts", "router",
          "ffn", "hyper_connection", "mixing", "sinkhorn", "rms_norm", "head", "loss",
          "gather_weights", "sum_gradients", "optimizer")
_SMALL = ("rms_norm", "gather_weights")  # inside a fusion they are the fusion's
_COPIES = ("copy", "transpose", "bitcast", "copy-start", "dynamic-slice", "dynamic-update-slice",
           "concatenate", "pad", "slice", "reshape")
ASSUMED = (
    "computing as the compiler estimates it, kernels and matrix products at the chip's peak; each "
    "collective alone, at the bandwidth of the busiest link that it uses; what is begun early "
    "hides behind computing; no further rounds where a capacity is short; never measured")
WORK = ("matrix products", "kernels", "copies", "SparseCores", "memory-bound")

# For each part of the network what it takes of a device's step: `seconds` of computing, as the
# compiler estimates it, and of those each of `WORK`; `flops` of matrix products, recomputation
# included; `sent_bytes` that its collectives are given; `collective_s` that these take, each alone
# on the links, and `overlapping_s` of those that computing may hide; and for each kind of
# collective `count KIND` and `bytes KIND`.
Costs = dict[str, collections.Counter[str]]


def scope_of(op_name: str) -> str:
    """The innermost scope in an operation's name, such as "jit(step)/transpose(jvp(head))/dot"."""
    names = [name for name in re.findall(r"[^/()]+", op_name) if name in SCOPES]
    while len(names) > 1 and names[-1] in _SMALL and names[-2] in (*OF_FUSIONS, *_SMALL):
        names.pop()
    return names[-1] if names else OTHER


def costs(program: Program, torus: Torus, speed: Speed) -> Costs:
    """What each scope that occurs takes.

    Conditionals, and loops whose trips depend on data, are left out. In this library they are what
    follows where a capacity is short: further rounds of the exchange and of sent tokens, further
    windows of an expert with far more than its share.

    Args:
      program: compiled.
      torus: the links of the slice that it is compiled for, with its devices.
      speed: of its chips.
    """
    parts: Costs = collections.defaultdict(collections.Counter)
    products = {site.computation.name for site in program.walk()
                if site.instruction.opcode in ("dot", "convolution")}
    for site, seconds in timed(program, speed):
        if site.exact:
            parts[_scope(site)].update({"seconds": seconds, _kind(site, products): seconds})
    for site in program.walk():
        if site.exact and (operations := flops_of(site)):
            parts[_scope(site)]["flops"] += operations * site.times
    for one in filter(lambda one: one.exact, collectives(program)):
        seconds, sent = torus.seconds(one) * one.times, one.bytes * one.times
        parts[scope_of(one.source)].update({
            "sent_bytes": sent, "collective_s": seconds, "overlapping_s": seconds * one.overlaps,
            f"count {one.kind}": one.times, f"bytes {one.kind}": sent})
    return dict(parts)


def multiplied(few: Costs, more: Costs, blocks: float, tables: float, fusions: float) -> Costs:
    """The costs of a deeper network from those of two that differ in nothing but their blocks.

    Args:
      few, more: of so many blocks and of some more.
      blocks: times the difference that are missing from `few`.
      tables, fusions: how many times as many of each the deeper one has.
    """
    def of(scope: str) -> collections.Counter[str]:
        a, b = (each.get(scope, collections.Counter()) for each in (few, more))
        times = tables if scope in OF_TABLES else fusions if scope in OF_FUSIONS else 1
        return collections.Counter({
            what: times * (a[what] + blocks * (b[what] - a[what])) for what in {*a, *b}})

    return {scope: of(scope) for scope in {*few, *more}}


def total(parts: Costs, what: str) -> float:
    """The sum over all parts."""
    return sum(part[what] for part in parts.values())


def by_scope(parts: Costs) -> dict[str, dict[str, float]]:
    """The parts, those that take longest first, without counts and what may overlap."""
    shown = ("seconds", *WORK, "flops", "sent_bytes", "collective_s")
    return {name: {what: amount for what in (*shown, *(f"bytes {kind}" for kind in KINDS))
                   if (amount := part[what]) or what in ("seconds", "flops", *shown[-2:])}
            for name, part in sorted(parts.items(), key=lambda item: (-item[1]["seconds"],
                                                                     item[0]))}


def by_kind(parts: Costs) -> dict[str, float]:
    """Seconds of each of `WORK`; what is none of the others is called bound by memory."""
    return {kind: total(parts, kind) for kind in WORK}


def _scope(site: Site) -> str:
    return scope_of(site.instruction.attribute(r'op_name="([^"]*)"') or "")


def _kind(site: Site, products: set[str]) -> str:
    instruction = site.instruction
    if instruction.opcode == "custom-call" and KERNEL in instruction.attributes:
        return "kernels"
    if flops_of(site) or products & set(instruction.called):
        return "matrix products"
    if on_sparse_cores(site):
        return "SparseCores"
    return "copies" if instruction.opcode in _COPIES else "memory-bound"


# --- The whole step ---


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


def roofline(parts: Costs, model_flops: float, peak_flops: float) -> Roofline:
    """The time of a step, and the model FLOPs utilisation that it comes to.

    Args:
      parts: of a program.
      model_flops: of a device's share of the step, nothing recomputed.
      peak_flops: of the chip, FLOPs a second.
    """
    compute_s, collective_s, hidden = (
        total(parts, what) for what in ("seconds", "collective_s", "overlapping_s"))
    step_s = collective_s - hidden + max(compute_s, hidden)
    return Roofline(compute_s=compute_s, collective_s=collective_s, overlapping_s=hidden,
                    step_s=step_s, mfu=model_flops / peak_flops / step_s)
