"""Rows of a chunk: the same bits from every home, however the text is cut."""

import contextlib
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import serving
from serving import END, ISOLATED, MODEL, PAD, SLOTS, VOCAB

from engram_jax.config import ROW_DTYPES
from engram_jax.errors import MachineError, UserError
from engram_jax.hashing.addressing import sites
from engram_jax.hashing.host import HostHash, reach_from_end
from engram_jax.hashing.ngrams import reach_from_dead
from engram_jax.model.documents import documents
from engram_jax.offload import prefetch
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.offload.host_cache import CachedTable
from engram_jax.offload.ngram_index import WAYS

pytestmark = pytest.mark.usefixtures("compilations")
TEXTS = np.random.default_rng(0).integers(0, VOCAB, (SLOTS, 12)).astype(np.int32)
TEXTS[0, 3] = TEXTS[1, 7] = TEXTS[1, 8] = TEXTS[2, 0] = TEXTS[2, 11] = END
models = pytest.mark.parametrize("model", [MODEL, ISOLATED], ids=["together", "isolated"])


@pytest.fixture(name="opened")
def closes_what_it_opens():
    with contextlib.ExitStack() as stack:
        def opened(model, homes=None, cache_bytes=0):
            rows = serving.host_rows(model, homes, cache_bytes)
            return stack.enter_context(contextlib.closing(rows))

        yield opened


def ids_of(model, tokens_BT, reach_BT=None):
    """By the reference in NumPy, {site: [B, T, H]}."""
    _, _, _, addressing = serving.parts(model)
    return {site.name: addressing.hashes[site.name].table_ids_numpy(
        np.asarray(addressing.vocabularies[site.name].lookup)[tokens_BT], site.layer,
        reach_BT=reach_BT) for site in sites(model)}


def reach_of(model, tokens_BT):
    if not model.isolate_documents:
        return None
    starts_BT = np.pad(tokens_BT[:, :-1] == END, ((0, 0), (1, 0)))
    return np.asarray(documents(jnp.asarray(starts_BT)).position_BT) + 1


def expected_rows(model, tokens_BT, dtype="float32"):
    ids, found = ids_of(model, tokens_BT, reach_of(model, tokens_BT)), {}
    for site in sites(model):
        form = RowFormat(dtype, site.dim)
        rows = form.unpack_numpy(form.pack(serving.table_array(model, site)))
        found[site.name] = rows[ids[site.name]]
    return found


def chunks(model, tokens_BT, size):
    """A text as `request` takes it, the last chunk filled up with pad tokens."""
    before = serving.parts(model).addressing.history_length
    padded = np.pad(tokens_BT, ((0, 0), (before, size)), constant_values=PAD)
    for start in range(0, tokens_BT.shape[1], size):
        count = min(size, tokens_BT.shape[1] - start)
        yield {"tokens": padded[:, start + before:start + before + size],
               "history": padded[:, start:start + before],
               "count": np.full(len(tokens_BT), count, np.int32)}


def gathered(rows, model, tokens_BT, size, where=np.asarray):
    """The rows of a text, chunk after chunk."""
    gathered = {site.name: [] for site in sites(model)}
    for chunk in chunks(model, tokens_BT, size):
        arrived = rows.request(**{**chunk, "tokens": where(chunk["tokens"])})
        for name, parts in gathered.items():
            parts.append(np.asarray(arrived[name])[:, :chunk["count"][0]])
    return {name: np.concatenate(parts, axis=1) for name, parts in gathered.items()}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, rows in found.items():
        np.testing.assert_array_equal(rows.view(np.uint32), expected[name].view(np.uint32))


# --- The same bits ---


@models
@pytest.mark.parametrize("size", [1, 3, 4, 12])
@pytest.mark.parametrize("home", ["host", "disk"])
def test_rows_from_the_host_do_not_depend_on_the_chunks(home, size, model, opened, tmp_path):
    homes = serving.disk_tables(model, tmp_path) if home == "disk" else None
    where = jnp.asarray if size == 3 else np.asarray
    assert_same(gathered(opened(model, homes), model, TEXTS, size, where),
                expected_rows(model, TEXTS))


@models
@pytest.mark.parametrize("size", [1, 4, 12])
def test_rows_on_the_device_do_not_depend_on_the_chunks(size, model):
    rows = serving.device_rows(model)
    for where in (np.asarray, jnp.asarray):
        assert_same(gathered(rows, model, TEXTS, size, where), expected_rows(model, TEXTS))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("home", ["host", "disk"])
def test_packed_rows_are_decoded_to_the_bits_of_numpy(home, dtype, opened, tmp_path):
    homes = (serving.disk_tables(MODEL, tmp_path, dtype) if home == "disk"
             else serving.host_tables(MODEL, dtype))
    assert_same(gathered(opened(MODEL, homes), MODEL, TEXTS, 4), expected_rows(MODEL, TEXTS, dtype))


def test_how_far_tokens_see_where_documents_begin():
    """Behind the end token; where the history does not tell, past all of it."""
    tokens = np.array([[5, END, 6, 8], [5, 6, 8, 9], [END, END, 5, 6]], np.int32)
    history = np.array([[END, 3], [3, END], [PAD, PAD]], np.int32)
    found = reach_from_end(tokens, history, END)
    assert found[:2].tolist() == [[2, 3, 1, 2], [1, 2, 3, 4]]
    assert (found[2, 0], *found[2, 1:].tolist()) == (9, 1, 1, 2)


# --- A dead token in the window ---


def test_a_dead_token_hides_itself_and_what_is_older(opened):
    """Whole or in chunks, by both hashes; behind it, the text is one that begins there."""
    dead_BT = np.zeros(TEXTS.shape, bool)
    dead_BT[0, 5] = dead_BT[1, 3] = dead_BT[1, 4] = dead_BT[2, 11] = True
    reach_BT = np.asarray(reach_from_dead(dead_BT))
    expected = ids_of(MODEL, TEXTS, reach_BT)
    hashing = HostHash(serving.parts(MODEL).addressing)
    whole = hashing(TEXTS, reach_BT=reach_BT)
    alone = ids_of(MODEL, TEXTS[:1, 6:])
    for name, ids in expected.items():
        np.testing.assert_array_equal(whole[name], ids)
        np.testing.assert_array_equal(ids[:1, 6:], alone[name])
        np.testing.assert_array_equal(ids[1, 3], ids[1, 4])
    before = 2
    padded = np.pad(dead_BT, ((0, 0), (before, 0)))
    rows, tables = opened(MODEL), expected_tables()
    for chunk, start in zip(chunks(MODEL, TEXTS, 4), (0, 4, 8), strict=True):
        part = slice(start, start + 4)
        reach = np.asarray(reach_from_dead(dead_BT[:, part], padded[:, start:start + before]))
        for source in (rows, serving.device_rows(MODEL)):
            arrived = source.request(**chunk, positions=reach - 1)
            for name, ids in expected.items():
                np.testing.assert_array_equal(arrived[name], tables[name][ids[:, part]])


def expected_tables():
    return {site.name: serving.table_array(MODEL, site) for site in sites(MODEL)}


# --- Caches that are filled ---


def cached(opened, model, tmp_path, device_ways, host_ways):
    """Rows by way of caches of so many sets on the device and in host memory, over a disk."""
    heads, dim = model.engram.heads, model.engram.head_dim
    set_bytes = WAYS * heads * RowFormat("float32", dim).row_bytes
    homes = {name: CachedTable(home, heads, host_ways * set_bytes)
             for name, home in serving.disk_tables(model, tmp_path).items()}
    return opened(model, homes, device_ways * set_bytes)


@models
@pytest.mark.parametrize("sets", [(1, 2), (3, 40)])
def test_filled_caches_hit_more_than_cold_ones_and_give_the_same_bits(
    sets, model, opened, tmp_path, monkeypatch
):
    """On the text that they are filled from, counted in stretches of any length."""
    monkeypatch.setattr(prefetch, "_COUNTED_AT_ONCE", 5)
    tiers = {}
    for kind in ("cold", "filled"):
        rows = cached(opened, model, tmp_path, *sets)
        if kind == "filled":
            rows.fill(TEXTS.reshape(-1))
        before = rows.counters
        assert_same(gathered(rows, model, TEXTS, 4), expected_rows(model, TEXTS))
        tiers[kind] = rows.counters.since(before).tiers
        assert list(tiers[kind]) == ["device cache", "host cache", "disk"]
    for tier in ("device cache", "host cache"):
        assert tiers["filled"][tier].hit_rate > tiers["cold"][tier].hit_rate
    assert tiers["filled"]["disk"].bytes < tiers["cold"]["disk"].bytes
    if sets[1] == 40:  # room for everything but the first n-grams of texts
        assert tiers["filled"]["host cache"].hit_rate + tiers["filled"]["device cache"].hit_rate > 1


def test_the_ngrams_that_a_text_has_most_often_stay(opened, tmp_path):
    """Room for eight of a site's: four n-grams are asked for again and again, others once."""
    rows = cached(opened, MODEL, tmp_path, 1, 1)
    often = np.tile(np.array([9, 8], np.int32), 50)
    rows.fill(np.concatenate([TEXTS.reshape(-1), often, TEXTS.reshape(-1)]))
    before = rows.counters
    assert_same(gathered(rows, MODEL, often[None, :12], 4), expected_rows(MODEL, often[None, :12]))
    found = rows.counters.since(before).tiers
    asked, hits = found["device cache"].asked, found["device cache"].hits
    assert asked - hits <= asked // 3


def test_no_tokens_empty_the_caches(opened, tmp_path):
    rows = cached(opened, MODEL, tmp_path, 4, 8)
    gathered(rows, MODEL, TEXTS, 12)
    rows.fill(np.empty(0, np.int32))
    before = rows.counters
    gathered(rows, MODEL, TEXTS, 12)
    found = rows.counters.since(before).tiers
    assert found["device cache"].hits == found["host cache"].hits == 0


def test_a_cache_is_not_filled_with_what_cannot_be(opened, tmp_path):
    rows = cached(opened, MODEL, tmp_path, 1, 1)
    with pytest.raises(UserError, match=r"token id = 300: must be in 0..299"):
        rows.fill(np.full(5, VOCAB, np.int32))


# --- The worker ---


class Watched(HostTable):
    """A home that tells which site was asked for, and fails when it is told to."""

    def told(self, name, seen, errors):
        self.name, self.seen, self.errors = name, seen, errors
        return self

    def lookup(self, ids_U, out=None):
        self.seen.append((self.name, threading.current_thread().name, sorted(ids_U.tolist())))
        if self.errors:
            raise self.errors.pop()
        return super().lookup(ids_U, out)


def watched(opened, errors=()):
    seen, errors = [], list(errors)
    homes = {name: Watched(home.format, home.packed_RB).told(name, seen, errors)
             for name, home in serving.host_tables(MODEL).items()}
    return opened(MODEL, homes), seen


def test_one_worker_serves_requests_and_layers_in_order(opened):
    rows, seen = watched(opened)
    requests = [rows.request(**chunk) for chunk in chunks(MODEL, TEXTS, 4)]
    for arrived in requests[::-1]:
        for name in ("layer_2", "layer_1"):
            arrived[name]
    assert [name for name, _, _ in seen] == ["layer_1", "layer_2"] * 3
    assert {thread for _, thread, _ in seen} == {"rows_0"}


def test_each_row_of_a_chunk_is_read_once_and_those_of_padding_never(opened):
    rows, seen = watched(opened)
    text_1T = np.array([[9, 9, 9, 9, 9]], np.int32)
    _, last = chunks(MODEL, text_1T, 4)
    arrived = rows.request(**last)
    first = np.asarray(arrived["layer_1"])
    assert dict(arrived).keys() == {"layer_1", "layer_2"}
    ids = ids_of(MODEL, text_1T)["layer_1"]
    assert seen[0][2] == sorted(ids[0, 4].tolist())
    np.testing.assert_array_equal(first[0, 0], expected_tables()["layer_1"][ids[0, 4]])
    counters = rows.counters
    assert (counters.tokens, counters.asked, counters.read) == (1, 8, 8)


@pytest.mark.parametrize("error", [
    MachineError("x: ended while it was read"), UserError("row id = 9: "), ZeroDivisionError(),
    SystemExit(1), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_error_is_raised_at_every_site_and_the_worker_lives(error, opened):
    rows, _ = watched(opened, [error])
    first, second, _ = (rows.request(**chunk) for chunk in chunks(MODEL, TEXTS, 4))
    for name in ("layer_2", "layer_1"):
        with pytest.raises(type(error)) as raised:
            first[name]
        assert raised.value is error
    np.testing.assert_array_equal(
        second["layer_1"], expected_rows(MODEL, TEXTS)["layer_1"][:, 4:8])


def test_a_token_that_there_is_not_is_an_error(opened):
    rows = opened(MODEL)
    arrived = rows.request(np.full((SLOTS, 4), VOCAB, np.int32))
    with pytest.raises(UserError, match=r"token id = 300: must be in 0..299"):
        arrived["layer_2"]
    with pytest.raises(UserError, match=r"token id = 300: must be in 0..299"):
        serving.device_rows(MODEL).request(np.full((SLOTS, 4), VOCAB, np.int32))


def test_nothing_is_asked_for_after_closing(opened):
    rows = opened(MODEL)
    rows.close()
    with pytest.raises(UserError, match="rows: their source has been closed"):
        rows.request(**next(chunks(MODEL, TEXTS, 4)))
