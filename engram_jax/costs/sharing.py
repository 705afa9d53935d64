"""Shall experts travel to tokens, or tokens to experts? By the time that their bytes take.

Experts that are gathered travel whole to every device: each time that a block runs in the compute
dtype, and their gradients in float32. Of X devices that share them, a block of the slice, each
gathers a share of them, and tokens and results travel instead (`model.sent_experts`). Both are
counted as `torus.Torus` counts collectives. Matrices also pass through a device's memory several
times on their way, as often as compiled programs have it. Nothing of it was compared with a
running TPU.
"""

from typing import NamedTuple

import numpy as np

from engram_jax.config import RunConfig
from engram_jax.costs.collectives import Collective
from engram_jax.costs.slices import Slice
from engram_jax.model.sent_experts import ROOM, pays_to_all
from engram_jax.settings import changed
from engram_jax.tables import collectives

_WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
# How often a number of a matrix is written or read beside the product that it is for: it arrives
# and is laid out; its gradient is made, laid out, and read by the collective.
_THERE, _BACK = 3, 4


class Sharing(NamedTuple):
    """Along how many devices experts are shared, and what their travels take of a device's step.

    Attributes:
      devices: that share them; 1 is gathered.
      weights_bytes, weights_s: matrices there, and their gradients back.
      memory_s: both, from and to memory; nothing where matrices are whole anyhow.
      tokens_bytes, tokens_s: tokens there and results back, and their gradients.
    """

    devices: int
    weights_bytes: float
    weights_s: float
    memory_s: float
    tokens_bytes: float = 0.0
    tokens_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.weights_s + self.memory_s + self.tokens_s

    @property
    def bytes(self) -> float:
        return self.weights_bytes + self.tokens_bytes


def sharing(run: RunConfig, there: Slice, split: int, devices: int) -> Sharing:
    """What sharing takes.

    Args:
      run: with experts.
      there: the slice.
      split: devices that parameters are split over.
      devices: that share the experts.
    """
    model, moe = run.model, run.model.moe
    assert moe is not None
    blocks, again = model.depth - moe.dense_layers, model.remat != "none"
    parts, width = run.training.accumulate, _WIDTH[model.compute_dtype]
    own = -(-moe.experts // devices) * 3 * model.width * moe.expert_ffn
    apart = split // devices

    blocked = np.arange(split).reshape(-1, devices)
    ordered = collectives.in_blocks(there.devices[:split], devices)
    torus = there.torus(ordered)

    def seconds(kind: str, size: float, groups: np.ndarray) -> float:
        return torus.seconds(Collective(
            kind=kind, shapes=(), bytes=int(size), times=1, exact=True, source="",
            groups=tuple(map(tuple, groups.tolist()))))

    times, whole, grads = blocks * parts, (1 + again) * width * own, 4 * own
    weights_s = 0.0 if apart == 1 else times * (
        (1 + again) * seconds("all-gather", width * own / apart, blocked.T)
        + seconds("reduce-scatter", grads, blocked.T))
    weights = times * (whole + grads) * (apart - 1) / apart
    passes = 0 if split == 1 else _THERE * whole + _BACK * grads
    memory_s = times * passes / (there.chip.hbm_gbytes * 1e9)
    if devices == 1:
        return Sharing(1, weights, weights_s, memory_s)

    one = (run.data.batch_size * run.data.sequence_length // len(there.devices) // parts
           * model.width * width)
    each = ROOM * moe.top_k * one
    # There go tokens, once more as rounds are computed anew whatever is kept, and gradients of what
    # they got; back come results, and gradients of tokens.
    there_times, back_times = times * 3, times * 2
    block = collectives.extent(ordered[:devices])
    kind, size, sent = (("all-gather", one, devices * one)
                        if pays_to_all(moe.top_k, devices, block)
                        else ("all-to-all", each, each))
    tokens = (there_times * sent + back_times * each) * (devices - 1) / devices
    tokens_s = (there_times * seconds(kind, size, blocked)
                + back_times * seconds("all-to-all", each, blocked))
    return Sharing(devices, weights, weights_s, memory_s, tokens, tokens_s)


def chosen(run: RunConfig, there: Slice, split: int) -> Sharing | None:
    """The way that takes least time; None without experts."""
    moe = run.model.moe
    if moe is None:
        return None
    return min((sharing(run, there, split, devices) for devices in _ways(split, moe.experts)),
               key=lambda way: way.seconds)


def _ways(split: int, experts: int) -> list[int]:
    return [devices for devices in range(1, experts + 1) if split % devices == 0]


def reason(run: RunConfig, there: Slice, split: int, devices: int) -> str:
    """Why experts are shared as they are, in a line; "" without experts."""
    moe = run.model.moe
    if moe is None:
        return ""
    return (_compared(run, there, split, devices, moe.experts)
            + _in_one_part(run, there, split))


def _in_one_part(run: RunConfig, there: Slice, split: int) -> str:
    """What it would take if matrices travelled once a step."""
    if run.training.accumulate == 1 or split == 1:
        return ""
    best = chosen(changed(run, {"training.accumulate": 1}), there, split)
    assert best is not None
    return (f"; with training.accumulate=1, if it fits, {_both(best)}, "
            + ("gathered" if best.devices == 1 else f"sent along {best.devices}"))


def _compared(run: RunConfig, there: Slice, split: int, devices: int, experts: int) -> str:
    gathered = sharing(run, there, split, 1)
    if devices == 1:
        other = min((sharing(run, there, split, each) for each in _ways(split, experts)[1:]),
                    key=lambda way: way.seconds, default=None)
        least = "" if other is None else (
            f"; tokens sent along {other.devices} devices would be {_both(other)}")
        return f"gathered: {_both(gathered)}{least}"
    own = sharing(run, there, split, devices)
    return (f"tokens sent along {devices} devices: {_both(own)}, of which tokens "
            f"{own.tokens_bytes / 1e9:.1f} GB; gathered, experts would be {_both(gathered)}")


def _both(way: Sharing) -> str:
    links = way.weights_s + way.tokens_s
    return (f"{way.bytes / 1e9:.1f} GB a device and step, {links:.3g} s on the links and "
            f"{way.memory_s:.3g} s in memory")
