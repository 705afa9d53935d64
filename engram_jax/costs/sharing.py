"""Shall experts travel to tokens, or tokens to experts? By the time that their bytes take.

Experts that are gathered travel whole to every device: each time that a block runs in the compute
dtype, and their gradients in float32. Along an axis of X devices that share them, each gathers a
share of them, and tokens and results travel instead (`model.sent_experts`). Both are counted as
`breakdown.Torus` counts collectives; nothing of it was compared with a running TPU.
"""

import math
from typing import NamedTuple

from engram_jax.config import RunConfig
from engram_jax.costs.breakdown import Torus
from engram_jax.costs.collectives import Collective
from engram_jax.model.sent_experts import ROOM, pays_to_all

_WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
SHARES = 64  # no more devices than these share the experts


class Sharing(NamedTuple):
    """Along how many devices experts are shared, and what their travels take of a device's step.

    Attributes:
      devices: that share them; 1 is gathered.
      weights_bytes, weights_s: matrices there, and their gradients back.
      tokens_bytes, tokens_s: tokens there and results back, and their gradients.
    """

    devices: int
    weights_bytes: float
    weights_s: float
    tokens_bytes: float = 0.0
    tokens_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.weights_s + self.tokens_s

    @property
    def bytes(self) -> float:
        return self.weights_bytes + self.tokens_bytes


def sharing(run: RunConfig, torus: Torus, split: int, devices: int) -> Sharing:
    """What sharing takes.

    Args:
      run: with experts.
      torus: the slice.
      split: devices that parameters are split over.
      devices: that share the experts.
    """
    model, moe = run.model, run.model.moe
    assert moe is not None
    blocks, again = model.depth - moe.dense_layers, model.remat != "none"
    parts, width = run.training.accumulate, _WIDTH[model.compute_dtype]
    own = -(-moe.experts // devices) * 3 * model.width * moe.expert_ffn
    apart = split // devices

    def seconds(kind: str, size: float, group: int) -> float:
        return torus.seconds(Collective(
            kind=kind, shapes=(), bytes=int(size), times=1, exact=True, group=group, source=""))

    times, there, back = blocks * parts, width * own, 4 * own
    weights_s = 0.0 if apart == 1 else times * (
        (1 + again) * seconds("all-gather", there / apart, apart)
        + seconds("reduce-scatter", back, apart))
    weights = times * ((1 + again) * there + back) * (apart - 1) / apart
    if devices == 1:
        return Sharing(1, weights, weights_s)
    tokens = run.data.batch_size * run.data.sequence_length // math.prod(torus.sizes) // parts
    one = tokens * model.width * width
    each = ROOM * moe.top_k * one
    # Tokens there, gradients of what they got, and, computed anew, tokens once more; back come
    # results, and gradients of tokens.
    there_again, back_again = times * (2 + again), times * 2
    if pays_to_all(moe.top_k, devices, torus=True):
        sent = there_again * one * devices + back_again * each
        sent_s = (there_again * seconds("all-gather", one, devices)
                  + back_again * seconds("all-to-all", each, devices))
    else:
        sent = (there_again + back_again) * each
        sent_s = (there_again + back_again) * seconds("all-to-all", each, devices)
    return Sharing(devices, weights, weights_s, sent * (devices - 1) / devices, sent_s)


def chosen(run: RunConfig, torus: Torus, split: int) -> Sharing | None:
    """The way that takes least time; None without experts."""
    moe = run.model.moe
    if moe is None:
        return None
    return min((sharing(run, torus, split, devices) for devices in range(1, SHARES + 1)
                if split % devices == 0 and devices <= moe.experts), key=lambda way: way.seconds)


def reason(run: RunConfig, torus: Torus, split: int, devices: int) -> str:
    """Why experts are shared as they are, in a line; "" without experts."""
    if run.model.moe is None:
        return ""
    gathered = sharing(run, torus, split, 1)
    if devices == 1:
        other = min((sharing(run, torus, split, each) for each in (2, 4, 8, 16)
                     if split % each == 0 and each <= run.model.moe.experts),
                    key=lambda way: way.seconds, default=None)
        least = "" if other is None else (
            f"; tokens sent along {other.devices} devices would be {_both(other)}")
        return f"gathered: {_both(gathered)}{least}"
    own = sharing(run, torus, split, devices)
    return (f"tokens sent along {devices} devices: {_both(own)}, of which tokens "
            f"{own.tokens_bytes / 1e9:.1f} GB; gathered, experts would be {_both(gathered)}")


def _both(way: Sharing) -> str:
    return f"{way.bytes / 1e9:.1f} GB a device and step, {way.seconds:.3g} s on the links"
