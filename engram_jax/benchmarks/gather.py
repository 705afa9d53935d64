"""What rows cost on the host: tokens to packed fp8 rows, ready to be sent to a device.

DeepSeek-V4.1's shapes (two layers, 24 rows of 264 bytes each a token) over real text, from tables
of 8 GiB in all, beside the plain way to do it in NumPy. Each step reads text that no step has read
before, and the arms take turns, so neither finds in a cache what the other has left there.

Shapes: B batch, T time, H rows of a token, U distinct rows.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from engram_jax import recipes
from engram_jax.config import require
from engram_jax.data.tokens import TokenStream
from engram_jax.hashing.addressing import Addressing
from engram_jax.hashing.host import HostHash
from engram_jax.offload.dedup import Fetch, distinct
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.runs.reader import Inputs, open_inputs
from engram_jax.settings import changed

LAYERS, ORDERS, HEADS, DIM = (1, 14), 3, 8, 256  # V4.1
TABLE_BYTES = 8 * 2**30  # of all layers; V4.1's own are 203 GB
STEPS_A_TURN = 16
_TILE_ROWS = 65_521  # a prime: rows of different heads get different bytes

Tables = dict[str, HostTable]
Step = tuple[np.ndarray, np.ndarray]  # tokens [B, T] and the history before them


def gather_benchmark(*, batches: Sequence[int] = (1, 8), steps: int = 2048, prefill: int = 8192,
                     table_bytes: int = TABLE_BYTES) -> dict[str, Any]:
    """Time both ways on the standard library's source text.

    Args:
      batches: numbers of sequences that decode together, a token each a step.
      steps: timed steps of each arm and batch, in turns of 16; medians are reported.
      prefill: tokens of one long prompt.
      table_bytes: of all tables together, at least.

    Returns:
      By batch, microseconds: `us_per_step` and `us_per_token` (hash, deduplicate, gather, of both
      layers), their parts `hash_us`, `distinct_us` and `lookup_us`, and beside them
      `numpy_us_per_step` (hash, `np.unique` and `table[ids]` in plain NumPy) and
      `bare_gather_us` (`table[ids]` of the asked rows alone). For the prompt: `prefill_ms` and
      `numpy_prefill_ms` of both layers, and of one `prefill_rows_asked`, `prefill_rows_read` and
      `prefill_rows_distinct`.
      `equal`: both ways found the same bytes. And what was measured.

    Raises:
      UserError: a size below 1.
      MachineError: not enough memory.
    """
    for field, value in (("batch", min(batches)), ("steps", steps), ("prefill", prefill),
                         ("table_bytes", table_bytes)):
        require(value >= 1, field, value, "must be at least 1")
    inputs = _inputs(table_bytes)
    addressing, started = inputs.addressing, time.perf_counter()
    tables = {site.name: _table(site.rows) for site in addressing.sites}
    fill_s = time.perf_counter() - started
    arms = _Arms(addressing, tables, max(prefill, *batches))
    times: dict[str, Any] = {}
    equal = True
    for batch in batches:
        text = _steps(inputs.tokens.train, batch, arms.hash.history_length)
        row = _measured(arms, text, steps)
        row["us_per_token"] = row["us_per_step"] / batch
        for name, us in row.items():
            times.setdefault(name, {})[str(batch)] = us
        equal &= _equal(arms, text)
    prompt = _prefill(arms, inputs.tokens.train, prefill)
    size = sum(table.nbytes for table in tables.values())
    return {
        **times, **prompt, "equal": equal,
        "table_gib": size / 2**30,
        "huge_page_gib": sum(table.huge_bytes for table in tables.values()) / 2**30,
        "table_fill_s": fill_s,
        "rows_per_head": addressing.sites[0].hash_config.rows_per_head,
        "table_rows": [table.rows for table in tables.values()],
        "rows_per_token": len(LAYERS) * ORDERS * HEADS,
        "row_bytes": RowFormat("fp8", DIM).row_bytes,
        "text_tokens": len(inputs.tokens.train),
        "steps": steps,
        "numpy_version": np.__version__,
        "jax_version": jax.__version__,
    }


def _inputs(table_bytes: int) -> Inputs:
    """The text of `tiny`, addressing two tables of V4.1's shape that have `table_bytes` in all."""
    per_head = RowFormat("fp8", DIM).row_bytes * len(LAYERS) * ORDERS * HEADS
    rows = max(2, -(-table_bytes // per_head))
    return open_inputs(changed(recipes.tiny(), {
        "model.depth": max(LAYERS) + 1, "model.engram.layers": LAYERS,
        "model.engram.rows_per_head": (rows,) * ORDERS, "model.engram.max_order": ORDERS + 1,
        "model.engram.heads": HEADS, "model.engram.head_dim": DIM}))


def _table(rows: int) -> HostTable:
    """A table in which every byte has been written."""
    table = HostTable.allocate(RowFormat("fp8", DIM), rows)
    tile_UB = np.random.default_rng(0).integers(
        0, 256, (_TILE_ROWS, table.format.row_bytes), dtype=np.uint8)
    for start in range(0, rows, _TILE_ROWS):
        table.write(start, tile_UB[:rows - start])
    return table


def _steps(stream: TokenStream, batch: int, before: int) -> Iterator[Step]:
    """Steps of one token a sequence; the sequences are `batch` equal parts of the text."""
    length = len(stream) // batch
    text_BS = stream.read(0, batch * length).reshape(batch, length)
    while True:
        for at in range(before, length):
            yield np.ascontiguousarray(text_BS[:, at:at + 1]), text_BS[:, at - before:at]


class _Arms:
    """The ways from tokens to packed rows; each returns the moments between its parts, too."""

    def __init__(self, addressing: Addressing, tables: Tables, tokens: int):
        self.hash, self.tables = HostHash(addressing), tables
        self._addressing = addressing
        # Where rows wait to be sent: one place a site, used again at every step.
        self._staging = [np.zeros((tokens * ORDERS * HEADS, table.format.row_bytes), np.uint8)
                         for table in tables.values()]

    def ours(self, step: Step) -> tuple[list[float], list[Fetch], list[np.ndarray]]:
        clock = [time.perf_counter()]
        ids = self.hash(*step)
        clock.append(time.perf_counter())
        wanted = [distinct(ids[name]) for name in self.tables]
        clock.append(time.perf_counter())
        rows = [table.lookup(fetch.ids_U, staging) for table, fetch, staging in zip(
            self.tables.values(), wanted, self._staging, strict=True)]
        clock.append(time.perf_counter())
        return clock, wanted, rows

    def plain(self, step: Step) -> tuple[list[float], list[Fetch], list[np.ndarray]]:
        """The same rows in plain NumPy, written without a thought for time."""
        clock = [time.perf_counter()]
        wanted, rows = [], []
        for site in self._addressing.sites:
            vocabulary = self._addressing.vocabularies[site.name]
            ids_BTH = self._addressing.hashes[site.name].table_ids_numpy(
                vocabulary.canonical(step[0]), site.layer, vocabulary.canonical(step[1]))
            wanted.append(Fetch(*np.unique(ids_BTH, return_inverse=True)))
            rows.append(self.tables[site.name].packed_RB[wanted[-1].ids_U])
        clock.append(time.perf_counter())
        return clock, wanted, rows

    def bare(self, step: Step) -> tuple[list[float], list[Fetch], list[np.ndarray]]:
        """The rows alone, their ids being known."""
        ids = self.hash(*step)
        flat = [(self.tables[name].packed_RB, ids[name].reshape(-1)) for name in self.tables]
        clock = [time.perf_counter()]
        rows = [table_RB[ids_U] for table_RB, ids_U in flat]
        clock.append(time.perf_counter())
        return clock, [], rows


def _measured(arms: _Arms, text: Iterator[Step], steps: int) -> dict[str, float]:
    """Median microseconds of each arm and of the parts of ours."""
    ways = {"us_per_step": arms.ours, "numpy_us_per_step": arms.plain, "bare_gather_us": arms.bare}
    clocks: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(1 + -(-steps // STEPS_A_TURN)):  # the first turn warms up
        for name, way in ways.items():
            clocks[name] += [way(next(text))[0] for _ in range(STEPS_A_TURN)]
    spent = {name: np.diff(np.array(turns[STEPS_A_TURN:])) * 1e6 for name, turns in clocks.items()}
    parts = np.median(spent["us_per_step"], axis=0)
    return {**{name: float(np.median(turns.sum(axis=1))) for name, turns in spent.items()},
            **dict(zip(("hash_us", "distinct_us", "lookup_us"), parts.tolist(), strict=True))}


def _prefill(arms: _Arms, stream: TokenStream, length: int, repeats: int = 5) -> dict[str, Any]:
    """One long prompt after another, each of text that has not been read."""
    require(2 * repeats * length <= len(stream), "prefill", length,
            f"must be at most {len(stream) // (2 * repeats)}, for this text")
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(repeats):
        for nth, (name, way) in enumerate((("ours", arms.ours), ("plain", arms.plain))):
            start = (2 * turn + nth) * length
            step = stream.read(start, start + length)[None], _no_history(arms)
            clock, wanted, rows = way(step)
            times[name].append(1e3 * (clock[-1] - clock[0]))
            if name == "ours":
                read, inverse = len(rows[0]), wanted[0].inverse
                needed = len(np.unique(wanted[0].ids_U[inverse]))
    return {"prefill_ms": statistics.median(times["ours"]),
            "numpy_prefill_ms": statistics.median(times["plain"]), "prefill_tokens": length,
            "prefill_rows_asked": inverse.size, "prefill_rows_read": read,
            "prefill_rows_distinct": needed}


def _no_history(arms: _Arms) -> np.ndarray:
    return np.zeros((1, arms.hash.history_length), np.int32)


def _equal(arms: _Arms, text: Iterator[Step], steps: int = 32) -> bool:
    """Whether both ways find the same bytes for every asked row."""
    for _ in range(steps):
        step = next(text)
        (_, ours, our_rows), (_, plain, rows) = arms.ours(step), arms.plain(step)
        for one, other, one_rows, other_rows in zip(ours, plain, our_rows, rows, strict=True):
            if not np.array_equal(one_rows[one.inverse], other_rows[other.inverse]):
                return False
    return True
