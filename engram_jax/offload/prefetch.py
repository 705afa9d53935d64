"""Rows for a network on the device, fetched from the host while earlier work of it runs.

`HostRows` hashes on the host, reads each row once on a worker thread, and puts rows onto the device
in the order of the layers.

Shapes: B sequences, T tokens, P tokens of history, H rows of a token, C columns of a row, U
distinct rows, X bytes of a packed row.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from engram_jax.hashing.addressing import Addressing
from engram_jax.hashing.host import NO_TOKEN, HostHash
from engram_jax.offload.counters import TierCounts, summed
from engram_jax.offload.dedup import distinct
from engram_jax.offload.device_cache import DeviceCache, Sender
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.home import Home
from engram_jax.offload.ngram_counts import NgramCounts

_COUNTED_AT_ONCE = 2**15  # tokens


class Chunk(NamedTuple):
    """Tokens on the host.

    Attributes:
      tokens_BT: raw ids, int32.
      count_B: how many of them are real; what rows the others get does not matter.
      history_BP: the raw ids before them, oldest first, int32.
      reach_BT: as `NgramHash.row_ids` takes it; None sees all.
    """

    tokens_BT: np.ndarray
    count_B: np.ndarray
    history_BP: np.ndarray
    reach_BT: np.ndarray | None


Answer = Callable[[str], jax.Array]  # the name of a site to its rows [B, T, H, C]


@dataclasses.dataclass
class Counters:
    """Of rows from the host.

    Attributes:
      tokens: that rows were fetched for.
      asked, read: rows, with repeats in a request and without.
      bytes: put onto the device, places of rows included.
      fetch_s: spent by the worker.
      latency_s: from each request until its last rows were there.
      waited_s: of that, how long somebody waited.
      tiers: of those read, what each tier did: "device cache", "host cache", and of the whole
        table "host" or "disk". Repeats in a request are no hits.
    """

    tokens: int = 0
    asked: int = 0
    read: int = 0
    bytes: int = 0
    fetch_s: float = 0.0
    latency_s: float = 0.0
    waited_s: float = 0.0
    tiers: dict[str, TierCounts] = dataclasses.field(default_factory=dict)

    def since(self, before: "Counters") -> "Counters":
        """What has been counted since these were `before`."""
        tiers = {name: counts - before.tiers[name] for name, counts in self.tiers.items()}
        return Counters(tiers=tiers, **{name: value - getattr(before, name)
                                        for name, value in vars(self).items() if name != "tiers"})

    @property
    def hidden_share(self) -> float:
        """How much of the time until rows were there nobody waited for."""
        return max(0.0, 1 - self.waited_s / self.latency_s) if self.latency_s else 1.0


class HostRows:
    """Tables off the device: a home for each site.

    One worker serves requests in the order in which they come, and each request's sites in the
    order in which the network needs them. What goes wrong there is raised where the rows are
    waited for.

    Args:
      addressing: tokens to rows.
      homes: for each site the home of its table.
      cache_bytes: on the device, for the rows of each site's n-grams that were used last; 0 keeps
        none there.
    """

    on_host = True

    def __init__(self, addressing: Addressing, homes: dict[str, Home], cache_bytes: int = 0):
        self._counters = Counters()
        self._hash = HostHash(addressing)
        self._heads = {site.name: site.hash_config.heads for site in addressing.sites}
        self._sources: dict[str, Sender | DeviceCache] = {
            name: DeviceCache(homes[name], heads, cache_bytes)
            if cache_bytes else Sender(homes[name]) for name, heads in self._heads.items()}
        self._formats = {name: home.format for name, home in homes.items()}
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "rows")

    @property
    def counters(self) -> Counters:
        return dataclasses.replace(self._counters, tiers=summed(
            [source.tiers() for source in self._sources.values()]))

    def fill(self, tokens_N: np.ndarray, end_id: int | None = None) -> None:
        """Fill every cache with the n-grams that a text has most often; what it held before goes.

        A cache learns from what it serves, so at first it has nothing; a sample of what will be
        served, such as the training text, makes it begin with what is asked for most. No tokens
        empty it. A cache in host memory also holds what one on the device above it does.

        Args:
          tokens_N: raw ids of the text. Its n-grams are counted here and now, 8 * (K + 2) bytes for
            each different one.
          end_id: the token after which a document ends.

        Raises:
          UserError: a token that the tokenizer does not have.
          MachineError: a table cannot be read; then a cache that was not filled is empty.
        """
        counts = {name: NgramCounts(heads) for name, heads in self._heads.items()}
        padded_1S = np.full((1, self._hash.history_length + len(tokens_N)), NO_TOKEN, np.int32)
        padded_1S[0, self._hash.history_length:] = tokens_N
        for start in range(0, len(tokens_N), _COUNTED_AT_ONCE):
            middle = start + self._hash.history_length
            history_1P = padded_1S[:, start:middle]
            tokens_1T = padded_1S[:, middle:middle + _COUNTED_AT_ONCE]
            reach_1T = None if end_id is None else reach_numpy(tokens_1T, history_1P, end_id)
            for name, ids in self._hash(tokens_1T, history_1P, reach_1T).items():
                counts[name].add(ids)
        for name, source in self._sources.items():
            self._worker.submit(source.fill, counts[name].most_frequent()).result()

    def on_device(self, *_: Any) -> Answer:
        raise AssertionError("tables on the host take tokens on the host")

    def ask(self, chunk: Chunk) -> Answer:
        futures: dict[str, concurrent.futures.Future] = {
            name: concurrent.futures.Future() for name in self._sources}
        self._worker.submit(self._fetch, chunk, futures, time.perf_counter())

        def answer(site: str) -> jax.Array:
            start = time.perf_counter()
            with jax.profiler.TraceAnnotation(f"wait for the rows of {site}"):
                packed_UX, inverse_BTH = futures[site].result()
            self._counters.waited_s += time.perf_counter() - start
            return placed(packed_UX, inverse_BTH, self._formats[site])

        return answer

    def _fetch(
        self, chunk: Chunk, futures: dict[str, concurrent.futures.Future], asked_at: float
    ) -> None:
        """Serve a request: on the worker."""
        start = time.perf_counter()
        try:
            real_BT = np.arange(chunk.tokens_BT.shape[1])[None] < chunk.count_B[:, None]
            ids = self._hash(chunk.tokens_BT, chunk.history_BP, chunk.reach_BT)
            self._counters.tokens += int(chunk.count_B.sum())
            for site, future in futures.items():
                with jax.profiler.TraceAnnotation(f"fetch the rows of {site}"):
                    found = self._read(site, ids[site], real_BT)
                now = time.perf_counter()
                self._counters.fetch_s += now - start
                self._counters.latency_s += now - asked_at
                start = asked_at = now  # counted before anybody who waits for it goes on
                future.set_result(found)
        except BaseException as error:  # or else somebody would wait for ever
            for future in futures.values():
                if not future.done():
                    future.set_exception(error)

    def _read(
        self, site: str, ids_BTH: np.ndarray, real_BT: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        """Each distinct row once, packed, and the place of each asked row among them."""
        source = self._sources[site]
        ids_U, inverse_NH = distinct(ids_BTH[real_BT], source.group)
        inverse_BTH = np.zeros(ids_BTH.shape, np.int32)
        inverse_BTH[real_BT] = inverse_NH
        sent = source.fetch(ids_U)
        counters = self._counters
        counters.asked += inverse_NH.size
        counters.read += ids_U.size
        counters.bytes += sent.bytes + inverse_BTH.nbytes
        return sent.packed_UB, jax.device_put(inverse_BTH)

    def close(self) -> None:
        self._worker.shutdown()
        for source in self._sources.values():
            source.close()


@functools.partial(jax.jit, static_argnames="format")
def placed(packed_UX: jax.Array, inverse_BTH: jax.Array, format: RowFormat) -> jax.Array:
    """Packed rows decoded and where they were asked for, float32 [B, T, H, C]."""
    return format.unpack(packed_UX).at[inverse_BTH].get(mode="promise_in_bounds")


def reach_numpy(tokens_BT: np.ndarray, history_BP: np.ndarray, end_id: int) -> np.ndarray:
    """How far each token sees where documents begin after `end_id`, int32 [B, T].

    A start further back than the history reaches makes no difference.
    """
    before_BS = np.concatenate([history_BP, tokens_BT], axis=1)
    at_S = np.arange(before_BS.shape[1], dtype=np.int32)
    starts_BS = np.zeros(before_BS.shape, bool)
    starts_BS[:, 1:] = before_BS[:, :-1] == end_id
    since_BS = np.maximum.accumulate(np.where(starts_BS, at_S, -before_BS.shape[1]), axis=1)
    return (at_S[None] - since_BS + 1)[:, history_BP.shape[1]:].astype(np.int32)
