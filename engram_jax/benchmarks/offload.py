"""What a table off the device costs: the same requests with tables in each home, and without any.

The workload is the paper's (sequences of 100 to 1024 tokens of real text), at a size that a CPU
finishes in minutes, or with a 4B dense model for an accelerator. Weights are random: they do not
change what a step costs. Arms take turns; medians are reported.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax import recipes
from engram_jax.config import EngramConfig, ModelConfig, require
from engram_jax.hashing.addressing import Addressing, Site, address
from engram_jax.inference.device_rows import DeviceRows
from engram_jax.inference.engine import Engine, Request
from engram_jax.inference.stages import serving_params
from engram_jax.model import transformer
from engram_jax.model.transformer import segments
from engram_jax.offload.counters import TierCounts
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableWriter, table_info
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.home import Home
from engram_jax.offload.host import HostTable
from engram_jax.offload.host_cache import CachedTable
from engram_jax.offload.prefetch import HostRows
from engram_jax.offload.source import Counters, RowSource
from engram_jax.runs.reader import Inputs, open_inputs
from engram_jax.settings import changed
from engram_jax.tables.layout import layout_of

ALONE = 8  # requests that are timed one by one, for the time to the first token
FILL_TOKENS = 2**20  # of the training text, from behind the prompts, that caches are filled from
_TILE_ROWS = 65_521  # a prime: rows of different heads get different bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the requests that it serves.

    Attributes:
      model: with a memory.
      dtype: of rows off the device.
      sequences: how many.
      prompt, generated: least and most tokens of each, drawn evenly.
      slots, chunk: of the engine.
      repeats: of every arm.
      homes: that are tried; "none" is the same model without memory.
      cache_bytes: of a site's cache on the device, or in host memory, in the arms that have one.
    """

    model: ModelConfig
    dtype: str
    sequences: int
    prompt: tuple[int, int] = (100, 1024)
    generated: tuple[int, int]
    slots: int
    chunk: int
    repeats: int
    homes: tuple[str, ...] = ("none", "device", "host", "disk")
    cache_bytes: int


def tiny() -> Workload:
    """The demo's backbone with a table of 4.2M rows of 16 columns, for a CPU."""
    model = changed(recipes.tiny().model, {"engram.rows_per_head": (524_288, 524_288)})
    return Workload(model=model, dtype="float32", sequences=48, generated=(16, 48),
                    slots=8, chunk=256, repeats=3, cache_bytes=2**22)


def dense_4b() -> Workload:
    """A dense model of 4.1B with a table of 42 GB in V4.1's format before block 1."""
    engram = EngramConfig(layers=(1,), rows_per_head=(6_700_000,) * 3, max_order=4, heads=8,
                          head_dim=256, kernel=0)
    model = changed(recipes.dense_4b().model, {"engram": engram})
    return Workload(model=model, dtype="fp8", sequences=512, generated=(100, 1024),
                    slots=128, chunk=1024, repeats=2,
                    homes=("none", "host"), cache_bytes=2**30)


def shortened(work: Workload, requests: int) -> Workload:
    """The workload with its first requests alone, each arm once.

    Raises:
      UserError: it has not so many, or none is wanted.
    """
    require(0 < requests <= work.sequences, "requests", requests,
            f"must be in 1..{work.sequences}")
    return dataclasses.replace(
        work, sequences=requests, slots=min(work.slots, requests), repeats=1)


class Way(NamedTuple):
    """How rows come from a home in an arm.

    Attributes:
      overlap: what needs no rows is dispatched before they are there.
      cache, host_cache: bytes of a site's cache on the device, and in host memory over a disk.
      filled: these are filled from training text; or else they begin empty and learn.
    """

    overlap: bool = True
    cache: int = 0
    host_cache: int = 0
    filled: bool = False


WORKLOADS = {"tiny": tiny, "4b": dense_4b}


def offload_benchmark(work: Workload | None = None, trace: str = "") -> dict[str, Any]:
    """Throughput and latency of a workload, by where its tables are.

    Args:
      work: `tiny()` by default.
      trace: a folder for a trace of a few requests with the table in host memory.

    Returns:
      `baseline_tokens_per_s`, without memory, prompts and generated tokens together. `arms`, each
      with `home`, the fields of its `Way`, `tokens_per_s`, `penalty` (the share of the baseline
      that it loses), `first_token_ms` (median, alone), `token_ms` and `token_ms_p99` (between a
      sequence's tokens, with others beside it), and for rows from the host `hidden_share` (of the
      time until rows were there, what nobody waited for), `hit_rate` (of the fastest cache),
      `bytes_per_token`, `fetch_us_per_token`,
      `read_share` (of the rows asked for, what is left without repeats) and `tiers`: for each,
      fastest first, `hit_rate`, `bytes_per_token`, `latency_us_p50` and `latency_us_p99` of a
      look-up. `same_tokens`: all arms with memory generated the same. And what was measured.
    """
    work = work or tiny()
    inputs = _inputs(work)
    requests = _requests(work, inputs)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arms = _arms(work, inputs, folder, stack)
        for arm in arms:
            arm.run(requests[:2])  # compiles
        for _ in range(work.repeats):
            for arm in arms:
                arm.time(requests)
        for arm in arms:
            arm.time_alone(requests[:ALONE])
        if trace:
            _trace(next(arm for arm in arms if arm.home == "host"), requests[: work.slots], trace)
        rows = [arm.measured() for arm in arms]
    baseline = next(row["tokens_per_s"] for row in rows if row["home"] == "none")
    for row in rows:
        row["penalty"] = 1 - row["tokens_per_s"] / baseline
    texts = [arm.tokens for arm in arms if arm.home != "none"]
    return {
        "baseline_tokens_per_s": baseline,
        "arms": [row for row in rows if row["home"] != "none"],
        "same_tokens": all(text == texts[0] for text in texts),
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "generated_tokens": sum(map(len, texts[0])),
        **{name: getattr(work, name) for name in ("sequences", "slots", "chunk", "dtype")},
        "table_gib": sum(site.rows * RowFormat(work.dtype, site.dim).row_bytes
                         for site in inputs.addressing.sites) / 2**30,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _inputs(work: Workload) -> Inputs:
    """The text of `tiny`, addressing the workload's tables."""
    inputs = open_inputs(recipes.tiny())
    own = inputs.addressing.vocabularies
    vocabulary = next(iter(own.values()))
    return dataclasses.replace(inputs, addressing=address(work.model, vocabulary, inputs.pad_id))


def _requests(work: Workload, inputs: Inputs) -> list[Request]:
    """Prompts that are stretches of the text, none read twice."""
    chance, stream, at = np.random.default_rng(0), inputs.tokens.train, 0
    requests = []
    for _ in range(work.sequences):
        length = int(chance.integers(work.prompt[0], work.prompt[1] + 1))
        tokens = int(chance.integers(work.generated[0], work.generated[1] + 1))
        prompt = stream.read(at, at + length)
        requests.append(Request(prompt=tuple(prompt.tolist()), tokens=tokens))
        at += length
    return requests


class _Arm:
    """An engine, and what it was seen to do."""

    def __init__(self, home: str, way: Way, text_N: np.ndarray, engine: Engine, rows: RowSource):
        self.home = home
        self.tokens: list[list[int]] = []
        self._way, self._text_N = way, text_N
        self._engine, self._rows = engine, rows
        self._counters = Counters()
        self._rates: list[float] = []
        self._first_s: list[float] = []
        self._between_s: list[float] = []

    def run(self, requests: list[Request]) -> list[list[int]]:
        return self._engine.generate(requests)

    def time(self, requests: list[Request]) -> None:
        """All requests at once, with caches as they are at the start."""
        if isinstance(self._rows, HostRows):
            self._rows.fill(self._text_N if self._way.filled else self._text_N[:0])
        before = self._rows.counters
        numbers = [self._engine.submit(request) for request in requests]
        out: dict[int, list[int]] = {number: [] for number in numbers}
        last: dict[int, float] = {}
        start = time.perf_counter()
        while self._engine.busy:
            events, now = self._engine.step(), time.perf_counter()
            for event in events:
                out[event.number].append(event.token)
                if event.number in last:
                    self._between_s.append(now - last[event.number])
                last[event.number] = now
        seconds = time.perf_counter() - start
        self.tokens = list(out.values())
        tokens = sum(len(request.prompt) for request in requests) + sum(map(len, self.tokens))
        self._rates.append(tokens / seconds)
        self._counters = self._rows.counters.since(before)

    def time_alone(self, requests: list[Request]) -> None:
        """The first token of one request after another."""
        for request in requests:
            start = time.perf_counter()
            self._engine.submit(dataclasses.replace(request, tokens=1))
            while not self._engine.step():
                pass
            self._first_s.append(time.perf_counter() - start)

    def measured(self) -> dict[str, Any]:
        ms = np.array(self._between_s) * 1e3
        row: dict[str, Any] = {
            "home": self.home, **self._way._asdict(),
            "tokens_per_s": statistics.median(self._rates),
            "first_token_ms": statistics.median(self._first_s) * 1e3,
            "token_ms": float(np.median(ms)), "token_ms_p99": float(np.quantile(ms, 0.99)),
            "hidden_share": None, "hit_rate": None, "bytes_per_token": None, "tiers": {},
        }
        if (counted := self._counters).tokens:
            row.update(hidden_share=counted.hidden_share,
                       hit_rate=self._hit_rate(counted),
                       bytes_per_token=counted.bytes / counted.tokens,
                       fetch_us_per_token=counted.fetch_s / counted.tokens * 1e6,
                       read_share=counted.read / counted.asked,
                       tiers={name: _told(tier, counted.tokens)
                              for name, tier in counted.tiers.items()})
        return row

    def _hit_rate(self, counted: Counters) -> float | None:
        """The hit rate of the fastest cache; None without one."""
        if not self._way.cache and not self._way.host_cache:
            return None
        return next(iter(counted.tiers.values())).hit_rate


def _told(tier: TierCounts, tokens: int) -> dict[str, float]:
    return {"hit_rate": tier.hit_rate, "bytes_per_token": tier.bytes / tokens,
            "latency_us_p50": tier.latency_us(50), "latency_us_p99": tier.latency_us(99)}


def _ways(home: str, size: int) -> list[Way]:
    if home not in ("host", "disk"):
        return [Way()]
    ways = [Way(), Way(overlap=False), Way(cache=size), Way(cache=size, filled=True)]
    if home == "disk":
        ways += [Way(host_cache=size), Way(host_cache=size, filled=True),
                 Way(cache=size, host_cache=8 * size, filled=True)]
    return ways


def _arms(
    work: Workload, inputs: Inputs, folder: Path, stack: contextlib.ExitStack
) -> list[_Arm]:
    require("none" in work.homes, "homes", work.homes, "must have none, to be compared with")
    params = jax.jit(lambda: serving_params(
        transformer.init(work.model, jax.random.key(0)), work.model))()
    prompts = work.sequences * work.prompt[1]
    text_N = inputs.tokens.train.read(prompts, min(prompts + FILL_TOKENS, len(inputs.tokens.train)))
    arms = []
    for home in work.homes:
        homes = {site.name: _home(work, inputs.addressing, site, home, folder)
                 for site in inputs.addressing.sites} if home in ("host", "disk") else {}
        for way in _ways(home, work.cache_bytes):
            model = changed(work.model, {"engram": None}) if home == "none" else work.model
            rows = _rows(work, inputs, home, homes, way)
            stack.callback(rows.close)
            engine = Engine(
                model, _without_memory(params, work.model) if home == "none" else params,
                transformer.init_router_bias(model), rows, pad_id=inputs.pad_id,
                known=inputs.vocab_size, slots=work.slots,
                length=work.prompt[1] + work.generated[1], chunk=work.chunk, overlap=way.overlap)
            arms.append(_Arm(home, way, text_N, engine, rows))
    return arms


def _without_memory(params: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The parameters of the same blocks, chained as they are without memory."""
    cut = list(zip(segments(model), params["segments"], strict=True))
    chain = []
    for whole in segments(changed(model, {"engram": None})):
        parts = [own["blocks"] for segment, own in cut if whole.start <= segment.start < whole.stop]
        chain.append({"blocks": jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)})
    return {**params, "segments": chain}


def _rows(
    work: Workload, inputs: Inputs, home: str, homes: dict[str, Home], way: Way
) -> RowSource:
    """Rows for an arm; `homes` are shared by the arms that read them."""
    if homes:
        cached = {site.name: CachedTable(homes[site.name], site.hash_config.heads, way.host_cache)
                  if way.host_cache else homes[site.name] for site in inputs.addressing.sites}
        return HostRows(inputs.addressing, cached, cache_bytes=way.cache)
    if home == "none":
        return DeviceRows(changed(work.model, {"engram": None}),
                          Addressing((), {}, {}), {})
    return DeviceRows(work.model, inputs.addressing, {
        site.name: _table(site) for site in inputs.addressing.sites})


def _table(site: Site) -> jax.Array:
    """A site's table on the device."""
    return jax.jit(lambda: layout_of(site).init(jax.random.key(site.layer), 0.02))()


def _home(
    work: Workload, addressing: Addressing, site: Site, home: str, folder: Path
) -> Home:
    """The same table off the device; where that dtype cannot hold the same, any bytes do."""
    format = RowFormat(work.dtype, site.dim)
    if home == "host":
        table = HostTable.allocate(format, site.rows)
        for start, packed_UB in _packed(format, site):
            table.write(start, packed_UB)
        return table
    path = folder / f"{site.name}.table"
    if not path.exists():
        with TableWriter(path, table_info(addressing, site.name, work.dtype)) as writer:
            for _, packed_UB in _packed(format, site):
                writer.write(packed_UB)
    return DiskTable.open(path)


def _packed(format: RowFormat, site: Site) -> Iterator[tuple[int, np.ndarray]]:
    rows = site.rows
    if format.dtype == "float32":
        table_RD = np.asarray(
            layout_of(site).gather(_table(site), jnp.arange(rows, dtype=jnp.int32)))
        for start in range(0, rows, _TILE_ROWS):
            yield start, format.pack(table_RD[start:start + _TILE_ROWS])
        return
    entries_UD = np.random.default_rng(0).normal(0, 0.02, (_TILE_ROWS, format.dim))
    tile_UB = format.pack(entries_UD.astype(np.float32))
    for start in range(0, rows, _TILE_ROWS):
        yield start, tile_UB[:rows - start]


def _trace(arm: _Arm, requests: list[Request], folder: str) -> None:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        arm.run(requests)
