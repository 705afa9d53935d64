"""Rows by way of a cache on the device are the rows of the home below."""

import numpy as np
import pytest

from engram_jax.errors import MachineError, UserError
from engram_jax.offload import device_cache
from engram_jax.offload.dedup import distinct
from engram_jax.offload.device_cache import DeviceCache, Sender, padded_size
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableInfo, TableWriter
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.offload.host_cache import CachedTable
from engram_jax.offload.ngram_index import WAYS

FORMAT, HEADS, NGRAMS = RowFormat("fp8", 40), 4, 300
PACKED = np.random.default_rng(0).integers(
    0, 255, (NGRAMS * HEADS, FORMAT.row_bytes), dtype=np.uint8)
SET_BYTES = WAYS * HEADS * FORMAT.row_bytes


class Counting(HostTable):
    """A home that remembers what was read, and fails when told to."""

    failing = False

    def lookup(self, ids_U, out=None):
        if self.failing:
            raise MachineError("the disk is gone")
        self.read = list(ids_U)
        return super().lookup(ids_U, out)


def cache(sets=4):
    home = Counting(FORMAT, PACKED)
    return home, DeviceCache(home, HEADS, sets * SET_BYTES)


def ids_of(*ngrams):
    return (np.array(ngrams)[:, None] * HEADS + np.arange(HEADS)).reshape(-1)


def fetched(source, ids_U):
    sent = source.fetch(ids_U)
    return np.asarray(sent.packed_UB)[: ids_U.size], sent


def test_rows_are_those_of_the_home_whatever_is_kept():
    random, (_, source) = np.random.default_rng(1), cache()
    for _ in range(60):
        wanted = random.zipf(1.3, random.integers(1, 90)) % NGRAMS
        asked = wanted[:, None] * HEADS + np.arange(HEADS)[None]
        ids_U, inverse = distinct(asked, HEADS)
        rows, _ = fetched(source, ids_U)
        assert (rows[inverse] == PACKED[asked]).all()


def test_what_was_asked_for_before_is_not_read_again():
    home, source = cache()
    fetched(source, ids_of(1, 2, 3))
    first = source.tiers()["device cache"].hits
    rows, _ = fetched(source, ids_of(3, 9, 1))
    assert home.read == list(ids_of(9))
    assert (rows == PACKED[ids_of(3, 9, 1)]).all()
    found = source.tiers()
    assert list(found) == ["device cache", "host"]
    here = found["device cache"]
    assert (first, here.hits, here.asked) == (0, 2 * HEADS, 6 * HEADS)
    assert (here.lookups, found["host"].asked) == (2, 4 * HEADS)
    assert here.bytes == 2 * HEADS * FORMAT.row_bytes


def test_an_ngram_that_pushes_out_another_does_not_change_what_both_get():
    """One set: nine n-grams do not fit, and those that hit are read before they are overwritten."""
    _, source = cache(sets=1)
    fetched(source, ids_of(*range(WAYS)))
    rows, _ = fetched(source, ids_of(*range(4), *range(100, 100 + WAYS)))
    assert (rows == PACKED[ids_of(*range(4), *range(100, 100 + WAYS))]).all()
    assert source.tiers()["device cache"].hits == 4 * HEADS


def test_a_failed_read_leaves_the_cache_as_it_was():
    home, source = cache()
    fetched(source, ids_of(1))
    home.failing = True
    with pytest.raises(MachineError, match="the disk is gone"):
        source.fetch(ids_of(1, 2))
    home.failing = False
    rows, _ = fetched(source, ids_of(1, 2))
    assert home.read == list(ids_of(2))
    assert (rows == PACKED[ids_of(1, 2)]).all()


@pytest.mark.parametrize("given_away", [False, True])
@pytest.mark.parametrize("filling", [False, True])
def test_what_did_not_reach_the_device_is_asked_for_again(filling, given_away, monkeypatch):
    """A transfer that fails, and a program that fails when the cache's memory is already its."""
    home, source = cache()
    fetched(source, ids_of(1))
    with monkeypatch.context() as patch:
        def refuse(*arrays):
            if given_away:
                arrays[0].delete()
            raise RuntimeError("the device is full")

        names = ("_served", "_kept") if given_away else ("device_put",)
        for name in names:
            patch.setattr(device_cache if given_away else device_cache.jax, name, refuse)
        with pytest.raises(RuntimeError, match="the device is full"):
            source.fill(ids_of(2).reshape(-1, HEADS)) if filling else source.fetch(ids_of(1, 2))
    rows, _ = fetched(source, ids_of(1, 2))
    assert (rows == PACKED[ids_of(1, 2)]).all()
    assert set(ids_of(2)) <= set(home.read)


def test_bytes_are_those_that_travel():
    _, source = cache()
    _, sent = fetched(source, ids_of(5, 6))
    assert sent.bytes == 16 * HEADS * FORMAT.row_bytes + 2 * 16 * 4
    straight = Sender(HostTable(FORMAT, PACKED))
    rows, sent = fetched(straight, ids_of(5, 6))
    assert (rows == PACKED[ids_of(5, 6)]).all()
    assert sent.bytes == 16 * FORMAT.row_bytes
    assert list(straight.tiers()) == ["host"]


@pytest.mark.parametrize("sets", [1, 4, 100])
def test_a_filled_cache_has_the_first_ngrams_without_asking(sets, monkeypatch):
    monkeypatch.setattr(device_cache, "FILLED_AT_ONCE", 5)
    home, source = cache(sets)
    fetched(source, ids_of(290))
    ids_GK = ids_of(*range(0, 90, 3)).reshape(-1, HEADS)
    source.fill(ids_GK)
    before = source.tiers()["device cache"].hits
    rows, _ = fetched(source, ids_GK.reshape(-1))
    assert (rows == PACKED[ids_GK.reshape(-1)]).all()
    hits = (source.tiers()["device cache"].hits - before) // HEADS
    assert min(30, sets * WAYS) * 3 // 4 <= hits <= min(30, sets * WAYS)
    if sets == 1:
        assert list(ids_GK[:WAYS].reshape(-1)) == sorted(set(ids_GK.reshape(-1)) - set(home.read))
    fetched(source, ids_of(290))
    assert home.read == list(ids_of(290))


def test_what_could_not_be_filled_is_empty():
    home, source = cache()
    fetched(source, ids_of(1))
    home.failing = True
    with pytest.raises(MachineError, match="the disk is gone"):
        source.fill(ids_of(1, 2).reshape(-1, HEADS))
    home.failing = False
    rows, _ = fetched(source, ids_of(1, 2))
    assert home.read == list(ids_of(1, 2))
    assert (rows == PACKED[ids_of(1, 2)]).all()


def test_nothing_asked_is_nothing_read():
    _, source = cache()
    source.fetch(np.zeros(0, np.int64))
    assert source.tiers()["device cache"].hit_rate == 0


@pytest.mark.parametrize(("ids", "line"), [
    (ids_of(NGRAMS), f"row id = {NGRAMS * HEADS}: must be in"),
    (np.array([0, 1, 2]), "row ids = 3: must be n-grams of 4 ids each")])
def test_wrong_ids_are_refused(ids, line):
    _, source = cache()
    with pytest.raises(UserError, match=line):
        source.fetch(ids)


def test_a_cache_without_room_is_refused():
    with pytest.raises(UserError, match="capacity_bytes"):
        DeviceCache(HostTable(FORMAT, PACKED), HEADS, SET_BYTES - 1)


def test_padded_sizes_are_few():
    assert {padded_size(count) for count in range(1000)} == {16, 32, 64, 128, 256, 512, 1024}


def test_a_stack_of_device_host_and_disk_gives_the_bits_of_the_disk(tmp_path):
    info = TableInfo(rows=len(PACKED), dim=FORMAT.dim, dtype="fp8", site="x", hash={},
                     fingerprint="")
    with TableWriter(tmp_path / "table", info) as writer:
        writer.write(PACKED)
    random = np.random.default_rng(2)
    host = CachedTable(DiskTable.open(tmp_path / "table", check="read"), HEADS, 8 * SET_BYTES)
    stack, straight = DeviceCache(host, HEADS, 2 * SET_BYTES), Sender(host)
    for _ in range(20):
        asked = ids_of(*random.zipf(1.3, 40) % NGRAMS).reshape(-1, HEADS)
        for source in (stack, straight):
            ids_U, inverse = distinct(asked, source.group)
            rows, _ = fetched(source, ids_U)
            assert (rows[inverse] == PACKED[asked]).all()
    found = stack.tiers()
    assert list(found) == ["device cache", "host cache", "disk"]
    assert found["disk"].asked == found["host cache"].asked - found["host cache"].hits
    assert found["device cache"].lookups == 20
    stack.fill(ids_of(*range(200, 250)).reshape(-1, HEADS))
    read = stack.tiers()["disk"].asked
    fetched(stack, ids_of(*range(200, 230)))
    assert stack.tiers()["disk"].asked == read
    stack.close()
