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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import Addressing, Site
from engram_jax.hashing.host import HostHash, reach_from_end
from engram_jax.hashing.token_hash import BEFORE
from engram_jax.offload.counters import summed
from engram_jax.offload.dedup import distinct
from engram_jax.offload.device_cache import DeviceCache, Sender
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.home import Home
from engram_jax.offload.ngram_counts import NgramCounts
from engram_jax.offload.source import Counters, RowSource, Tokens

_COUNTED_AT_ONCE = 2**15  # tokens


class _Chunk(NamedTuple):
    """Holds what `RowSource.request` was given."""

    tokens_BT: Tokens
    history_BP: np.ndarray | None
    positions_BT: np.ndarray | None
    count_B: np.ndarray | None


class _Arrived(NamedTuple):
    """Holds rows on the device: packed, uint8 [U, X], and where each goes, int32 [B, T, H]."""

    packed_UX: jax.Array
    inverse_BTH: jax.Array


class _RowsOnTheWay(Mapping[str, jax.Array]):
    """Maps the sites of a request to their rows; to take a site's is to wait for them.

    Attributes:
      futures: for each site, in the order of the layers.
      known_at: when the tokens were known, by `time.perf_counter`; waiting for them is not counted
        as waiting for rows.
    """

    def __init__(self, formats: dict[str, RowFormat], counters: Counters):
        self.futures: dict[str, concurrent.futures.Future[_Arrived]] = {
            name: concurrent.futures.Future() for name in formats}
        self.known_at = 0.0
        self._formats, self._counters = formats, counters

    def __getitem__(self, site: str) -> jax.Array:
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(f"wait for the rows of {site}"):
            arrived = self.futures[site].result()
        waited = time.perf_counter() - max(start, self.known_at)
        self._counters.waited_s += max(0.0, waited)
        return spread(*arrived, self._formats[site])

    def __iter__(self) -> Iterator[str]:
        return iter(self.futures)

    def __len__(self) -> int:
        return len(self.futures)


class HostRows(RowSource):
    """Brings the rows of tokens to the device from tables that are off it, one home for each site.

    One worker serves requests in the order in which they come, and each request's sites in the
    order in which the network needs them. What goes wrong there is raised where the rows are
    waited for; the requests behind it are served all the same.

    Args:
      addressing: tokens to row ids.
      homes: the name of each site to the home of its table; closed with this.
      end_id: the raw id after which a document begins, where n-grams stop; None lets them cross.
      cache_bytes: on the device, for the rows of each site's n-grams that were used last; 0 keeps
        none there.

    Raises:
      UserError: a site without a home, or a home that has another table's rows; a cache too small;
        as `RowSource`.
    """

    def __init__(self, addressing: Addressing, homes: Mapping[str, Home],
                 end_id: int | None = None, cache_bytes: int = 0):
        super().__init__(addressing, end_id)
        require(isinstance(homes, Mapping), "homes", type(homes).__name__,
                "must be a home for the name of each site, such as {\"layer_2\": open_table(...)}")
        prints = addressing.fingerprints()
        for site in addressing.sites:
            _check_home(site, homes.get(site.name), prints[site.name])
        self._counters = Counters()
        self._hash = HostHash(addressing)
        self._heads = {site.name: site.hash_config.heads for site in addressing.sites}
        self._senders: dict[str, Sender | DeviceCache] = {
            name: DeviceCache(homes[name], heads, cache_bytes)
            if cache_bytes else Sender(homes[name]) for name, heads in self._heads.items()}
        self._formats = {name: homes[name].format for name in self._heads}
        self._closed = False
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "rows")

    @property
    def counters(self) -> Counters:
        return dataclasses.replace(self._counters, tiers=summed(
            [sender.tiers() for sender in self._senders.values()]))

    def fill(self, tokens_N: np.ndarray) -> None:
        """Fill every cache with the n-grams that a text has most often; what it held before goes.

        A cache learns from what it serves, so at first it has nothing; a sample of what will be
        served, such as the training text, makes it begin with what is asked for most. No tokens
        empty it. A cache in host memory also holds what one on the device above it does.

        Args:
          tokens_N: raw ids of the text. Its n-grams are counted here and now, 8 * (K + 2) bytes for
            each different one.

        Raises:
          UserError: a token that the tokenizer does not have.
          MachineError: a table cannot be read; as `Home.fill`.
        """
        counts = {name: NgramCounts(heads) for name, heads in self._heads.items()}
        padded_1S = np.full((1, self.history_length + len(tokens_N)), BEFORE, np.int32)
        padded_1S[0, self.history_length:] = tokens_N
        for start in range(0, len(tokens_N), _COUNTED_AT_ONCE):
            middle = start + self.history_length
            ids = self._ids(padded_1S[:, middle:middle + _COUNTED_AT_ONCE],
                            padded_1S[:, start:middle])
            for name, ids_BTH in ids.items():
                counts[name].add(ids_BTH)
        for name, sender in self._senders.items():
            self._submit(sender.fill, counts[name].most_frequent()).result()

    def request(
        self, tokens: Tokens, history: np.ndarray | None = None,
        positions: np.ndarray | None = None, count: np.ndarray | None = None,
    ) -> Mapping[str, jax.Array]:
        """See `RowSource.request`."""
        rows = _RowsOnTheWay(self._formats, self._counters)
        self._submit(self._serve, _Chunk(tokens, history, positions, count), rows)
        return rows

    def close(self) -> None:
        """See `RowSource.close`; what was asked for before still comes."""
        self._closed = True
        self._worker.shutdown()
        for sender in self._senders.values():
            sender.close()

    def _submit(self, work: Callable[..., Any], *arguments: object) -> concurrent.futures.Future:
        if self._closed:
            raise UserError("rows: their source has been closed")
        return self._worker.submit(work, *arguments)

    def _ids(self, tokens_BT: np.ndarray, history_BP: np.ndarray | None,
             positions_BT: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Hash tokens to row ids for each site, int64 [B, T, H]."""
        reach_BT = None
        if positions_BT is not None:
            reach_BT = np.asarray(positions_BT) + 1
        elif self.end_id is not None:
            if history_BP is None:
                history_BP = np.full((len(tokens_BT), self.history_length), BEFORE, np.int32)
            reach_BT = reach_from_end(tokens_BT, history_BP, self.end_id)
        return self._hash(tokens_BT, history_BP, reach_BT)

    def _serve(self, chunk: _Chunk, rows: _RowsOnTheWay) -> None:
        """Serve a request; this runs on the worker."""
        try:
            tokens_BT = np.asarray(chunk.tokens_BT)  # waits for the device, if they are there
            start = rows.known_at = time.perf_counter()
            self.check_shapes(tokens_BT, chunk.history_BP, chunk.positions_BT)
            ids = self._ids(tokens_BT, chunk.history_BP, chunk.positions_BT)
            real_BT = np.ones(tokens_BT.shape, bool)
            if chunk.count_B is not None:
                real_BT = np.arange(tokens_BT.shape[1])[None] < np.asarray(chunk.count_B)[:, None]
            self._counters.tokens += int(real_BT.sum())
            for site, future in rows.futures.items():
                with jax.profiler.TraceAnnotation(f"fetch the rows of {site}"):
                    arrived = self._fetch(site, ids[site], real_BT)
                now = time.perf_counter()
                self._counters.fetch_s += now - start
                self._counters.latency_s += now - start
                start = now  # counted before anybody who waits for it goes on
                future.set_result(arrived)
        except BaseException as error:  # or else somebody would wait for ever
            for future in rows.futures.values():
                if not future.done():
                    future.set_exception(error)

    def _fetch(self, site: str, ids_BTH: np.ndarray, real_BT: np.ndarray) -> _Arrived:
        """Send each distinct row of real tokens once, and where each asked one is among them."""
        sender = self._senders[site]
        ids_U, inverse_NH = distinct(ids_BTH[real_BT], sender.group)
        inverse_BTH = np.zeros(ids_BTH.shape, np.int32)
        inverse_BTH[real_BT] = inverse_NH
        sent = sender.fetch(ids_U)
        counters = self._counters
        counters.asked += inverse_NH.size
        counters.read += ids_U.size
        counters.bytes += sent.bytes + inverse_BTH.nbytes
        return _Arrived(sent.packed_UB, jax.device_put(inverse_BTH))


def _check_home(site: Site, home: Home | None, fingerprint: str) -> None:
    require(home is not None, "homes", site.name, "has no home; every site needs one")
    require(isinstance(home, Home), f"homes[{site.name!r}]", home,
            "must be a home, as `open_table` and `host_table` make them")
    assert home is not None
    size = home.rows, home.format.dim
    require(size == (site.rows, site.dim), f"homes[{site.name!r}]", size,
            f"rows and columns; the hash needs {(site.rows, site.dim)}")
    require(home.fingerprint in ("", fingerprint), f"homes[{site.name!r}]", home.fingerprint,
            f"is the fingerprint of another hash or tokenizer than {fingerprint}")


@functools.partial(jax.jit, static_argnames="format")
def spread(packed_UX: jax.Array, inverse_BTH: jax.Array, format: RowFormat) -> jax.Array:
    """Decode packed rows and put them where they were asked for, float32 [B, T, H, C]."""
    return format.unpack(packed_UX).at[inverse_BTH].get(mode="promise_in_bounds")
