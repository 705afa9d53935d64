"""What a real training step costs on the devices that are there, and which part of it takes how
long: tokens a second, MFU against the chips' peak, time by the code's scopes from a profile."""

import collections
import itertools
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData
from jax.sharding import Mesh

from engram_jax import recipes
from engram_jax.benchmarks.table import zipf_batch
from engram_jax.config import RunConfig
from engram_jax.costs.accounting import account
from engram_jax.costs.breakdown import scope_of
from engram_jax.costs.hlo import Program, parse
from engram_jax.costs.slices import CHIPS
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.settings import changed
from engram_jax.training import placement
from engram_jax.training.capacity import with_capacity
from engram_jax.training.state import init_state
from engram_jax.training.step import train_step

STEPS, PROFILED = 9, 3
# Dense bfloat16 products, 1e12 FLOPs a second: of TPUs as in `costs.slices`, of GPUs as in their
# makers' data sheets, without sparsity.
PEAKS = {
    "TPU v4": CHIPS["v4"].peak_teraflops, "TPU v5 lite": CHIPS["v5e"].peak_teraflops,
    "TPU v5e": CHIPS["v5e"].peak_teraflops, "TPU v5": CHIPS["v5p"].peak_teraflops,
    "TPU v5p": CHIPS["v5p"].peak_teraflops, "TPU v6 lite": CHIPS["v6e"].peak_teraflops,
    "TPU v6e": CHIPS["v6e"].peak_teraflops, "TPU7x": CHIPS["tpu7x"].peak_teraflops,
    "NVIDIA A100": 312.0, "NVIDIA H100": 989.4, "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989.4, "NVIDIA H200 NVL": 835.5,
    "NVIDIA B200": 2250.0,
}
# Kernels of libraries that a GPU starts from a graph of launches: a profile does not say of which
# operation they are. And copies between its buffers.
UNNAMED = "unnamed"
# They run other operations of the program, whose own time counts.
_AROUND = ("while", "call", "conditional", "async-start", "async-done")


def cut_27b() -> RunConfig:
    """Four blocks of engram-27b with one Engram layer and an eighth of its rows: about 41 GB of
    state, gradients with it. Eight sequences a device, one after another: on a pod the optimizer of
    a block is divided among all devices, and here one device's is made for these alone."""
    return changed(recipes.engram_27b(), {
        "name": "engram-27b, 4 blocks", "baseline": "", "model.depth": 4,
        "model.engram.layers": (1,), "model.engram.rows_per_head": (282_800, 282_800),
        "data.batch_size": 8 * jax.device_count(), "training.accumulate": 8,
        "model.remat": "outputs"})


WORKLOADS: dict[str, Callable[[], RunConfig]] = {
    "tiny": recipes.tiny, "small": recipes.small, "27b": cut_27b}


def step_benchmark(
    run: RunConfig, mesh: Mesh | None = None, steps: int = STEPS, profiled: int = PROFILED
) -> dict[str, Any]:
    """Time the training step of a run, on tokens with the frequencies of text.

    Args:
      run: the run.
      mesh: where; None is all devices.
      steps: that are timed, each for itself.
      profiled: steps that are traced after them.

    Returns:
      `attention`, its implementation, `stream_layout`, `device`, `devices`, `mesh`, `step_s`
      (median), `tokens_per_s`, `mfu` (None where `mfu_reason` says why), `model_flops` of a device
      and step, `by_scope`, seconds of a device's operations in a step by the code's scopes (what
      runs at once adds up), `compile_s`, and `peak_bytes` where the device tells.

    Raises:
      UserError: the mesh does not divide the run.
    """
    mesh = mesh or placement.chosen_mesh()
    placement.check(run, mesh)
    addressing = address(run.model, CompressedVocabulary.identity(run.model.vocab_size), 0)
    run = with_capacity(run, addressing, (zipf_batch(run, number) for number in range(4)), mesh)
    state = jax.jit(lambda: init_state(run), out_shardings=placement.shardings(run, mesh))()
    batches = (placement.put(zipf_batch(run, number), mesh) for number in itertools.count())
    start = time.perf_counter()
    compiled = jax.jit(train_step(run, addressing, mesh), donate_argnums=0).lower(
        state, next(batches)).compile()
    compile_s = time.perf_counter() - start
    times = []
    for batch in itertools.islice(batches, steps + 1):  # the first warms up
        batch = jax.block_until_ready(batch)
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        times.append(time.perf_counter() - start)
    assert np.isfinite(metrics["learning/loss"])
    step_s = statistics.median(times[1:])
    parts = _profiled(compiled, state, batches, profiled, len(mesh.local_devices))
    return {**_rates(run, mesh, step_s), "by_scope": parts, "compile_s": compile_s,
            "peak_bytes": _peak_bytes(mesh), "jax": jax.__version__}


def _rates(run: RunConfig, mesh: Mesh, step_s: float) -> dict[str, Any]:
    """What follows of a step's time."""
    kind = mesh.devices.flat[0].device_kind
    numbers = account(placement.settled(run, mesh))
    tokens = run.data.batch_size * run.data.sequence_length
    flops, peak = numbers.flops_per_token * tokens / mesh.size, peak_flops(kind)
    return {
        "run": run.name, "attention": numbers.attention, "stream_layout": numbers.stream_layout,
        "device": kind, "devices": mesh.size, "mesh": placement.shape_of(mesh),
        "tokens_per_step": tokens, "step_s": step_s, "tokens_per_s": tokens / step_s,
        "model_flops": flops, "mfu": None if peak is None else flops / peak / step_s,
        "mfu_reason": f"the peak of {kind!r} is not known" if peak is None else ""}


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOPs a second of a device kind as jax names it; None where unknown, as it is
    of a part of a GPU."""
    names = [name for name in PEAKS if re.match(rf"{re.escape(name)}(?![a-zA-Z0-9])", kind)
             and "MIG" not in kind]
    return PEAKS[max(names, key=len)] * 1e12 if names else None


def _profiled(
    compiled: Any, state: Any, batches: Iterator[Any], steps: int, devices: int
) -> dict[str, float]:
    """Seconds of a device's step by scope, the longest first."""
    ready = jax.block_until_ready(list(itertools.islice(batches, steps)))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for batch in ready:
                state, _ = jax.block_until_ready(compiled(state, batch))
        traces = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        seconds = by_scope(parse(compiled.as_text()), [
            ProfileData.from_file(str(trace)) for trace in traces])
    return {name: total / steps / devices for name, total in sorted(
        seconds.items(), key=lambda item: -item[1])}


def by_scope(program: Program, traces: list[Any]) -> dict[str, float]:
    """Seconds of a program's operations by scope, as profiles have them.

    An event belongs to the operation that it is named after or says that it is of; what only runs
    others, such as a loop, is left out. Of a GPU its streams count, and whatever else they ran is
    `UNNAMED`; other lines of it say once more what these ran.
    """
    scopes = {}
    for site in program.walk():
        instruction = site.instruction
        if instruction.opcode not in _AROUND:
            scopes[instruction.name] = scopes[_kernel(instruction.name)] = scope_of(
                instruction.attribute(r'op_name="([^"]*)"') or "")
    planes = [plane for trace in traces for plane in trace.planes]
    on_gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    seconds: collections.Counter[str] = collections.Counter()
    lines = [line for plane in on_gpus or planes for line in plane.lines
             if not on_gpus or line.name.startswith("Stream")]
    for event in (event for line in lines for event in line.events):
        if scope := scopes.get(_operation(event), UNNAMED if on_gpus else None):
            seconds[scope] += event.duration_ns / 1e9
    return dict(seconds)


def _kernel(name: str) -> str:
    """What a GPU's kernel of an operation is called."""
    return re.sub(r"\W", "_", name)


def _operation(event: Any) -> str:
    """The HLO operation of a profile's event: on GPUs and CPUs it is told, a TPU's is named."""
    told = dict(event.stats).get("hlo_op")
    name = event.name.split(" = ")[0] if told is None else str(told)
    return name.removeprefix("%")


def _peak_bytes(mesh: Mesh) -> int | None:
    stats = mesh.local_devices[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else None
