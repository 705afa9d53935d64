"""TPU slices that programs can be compiled for, whether they are there or not."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import topologies

from engram_jax.config import require
from engram_jax.costs.torus import Torus
from engram_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU device as jax sees it.

    Attributes:
      hbm_gib: what libtpu 0.0.42 lets a program have ("exceeds available HBM (15.75G)"); the chip
        has a little more (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm: 32, 16, 95,
        32 and 192 GiB a chip, and two devices a chip on tpu7x).
      peak_teraflops: bfloat16, same source.
      hbm_gbytes: 1e9 bytes a second from and to memory (same source: 1228, 819, 2765, 1638 and 7380
        a chip).
      axes, most: of a slice's layout, and how many chips one may have (same source).
      ring: how many chips along an axis close to a ring
        (https://jax-ml.github.io/scaling-book/tpus/: 16 of v5e and v6e, 4 of the others).
      link_gbytes: 1e9 bytes a second over one link to a neighbour in one direction: the
        interconnect bandwidth of a chip (same source: 2400, 1600, 4800, 3584 and 9600 Gbit/s) over
        its links, two for each axis.
      clock_ghz: the peak over the multiplications and additions that its matrix units do in a
        cycle; turns the compiler's cycles into seconds.
      options: what libtpu needs to be told beside the slice's name.
    """

    hbm_gib: float
    peak_teraflops: float
    clock_ghz: float
    link_gbytes: float
    hbm_gbytes: float
    axes: int
    most: int
    ring: int = 4
    options: tuple[tuple[str, Any], ...] = ()


CHIPS = {
    "v4": Chip(hbm_gib=30.75, peak_teraflops=275, clock_ghz=1.05, link_gbytes=50, hbm_gbytes=1228,
               axes=3, most=4096,
               options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(hbm_gib=15.75, peak_teraflops=197, clock_ghz=1.5, link_gbytes=50, hbm_gbytes=819,
                axes=2, most=256, ring=16),
    "v5p": Chip(hbm_gib=95.74, peak_teraflops=459, clock_ghz=1.75, link_gbytes=100, hbm_gbytes=2765,
                axes=3, most=8960),
    "v6e": Chip(hbm_gib=31.25, peak_teraflops=918, clock_ghz=1.75, link_gbytes=112, hbm_gbytes=1638,
                axes=2, most=256, ring=16),
    "tpu7x": Chip(hbm_gib=94.75, peak_teraflops=1153.5, clock_ghz=2.2, link_gbytes=200,
                  hbm_gbytes=3690, axes=3, most=9216),
}

# libtpu asks the cloud about the machine that it is on, and logs that there is none. Two programs
# may compile at a time: neither touches a device.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled", "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips side by side.

    Attributes:
      chip: what each is.
      sizes: how many along each axis.
      devices: as jax has them.
    """

    chip: Chip
    sizes: tuple[int, ...]
    devices: list[jax.Device]

    def torus(self, devices: Iterable[jax.Device]) -> Torus:
        """Its links, for a program that runs on these devices, in this order.

        An axis closes to a ring where it is as long as `Chip.ring` or a multiple of that; of three
        axes all must be.
        """
        closed = tuple(size % self.chip.ring == 0 for size in self.sizes)
        if self.chip.axes == 3:
            closed = (all(closed),) * 3
        places = tuple(tuple(device.coords[:self.chip.axes]) for device in devices)
        return Torus(self.sizes, closed, self.chip.link_gbytes * 1e9, places)


def slice_of(topology: str) -> Slice:
    """A slice that need not exist, such as "v5p:4x4x4".

    Raises:
      UserError: no libtpu, or no such slice.
    """
    name, _, layout = topology.partition(":")
    require(name in CHIPS and re.fullmatch(r"\d+(x\d+)*", layout) is not None, "topology", topology,
            f"must be a chip ({', '.join(CHIPS)}) and its layout, for example v5p:4x4x4")
    chip, sizes = CHIPS[name], tuple(int(size) for size in layout.split("x"))
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
        described = topologies.get_topology_desc(topology, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology = {topology!r}: there is no such slice: {error}") from error
    return Slice(chip=chip, sizes=sizes, devices=described.devices)
