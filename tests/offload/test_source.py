"""Rows for a network that is not ours: the same from every home, ahead of need, with its errors."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import ROW_DTYPES, EngramConfig
from engram_jax.errors import MachineError, UserError
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.inference.device_rows import DeviceRows
from engram_jax.offload.arrays import host_table, open_table, write_table
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.offload.host_cache import CachedTable
from engram_jax.offload.prefetch import HostRows
from engram_jax.tables.layout import layout_of

pytestmark = pytest.mark.usefixtures("compilations")

VOCAB, END = 300, 7
CONFIG = EngramConfig(layers=(2, 5), rows_per_head=(64, 128), heads=2, head_dim=8, shards=4,
                      vocab_size=VOCAB)
ADDRESSING = address(CONFIG)
TABLES = {site.name: np.random.default_rng(site.layer).standard_normal(
    (site.rows, site.dim)).astype(np.float32) for site in ADDRESSING.sites}
TEXT = np.random.default_rng(0).integers(0, VOCAB, (3, 12)).astype(np.int32)
TEXT[0, 3] = TEXT[1, 7] = TEXT[1, 8] = END


def sharded(site):
    """The table as one on a mesh is stored, its padding full of what nobody may see."""
    layout = layout_of(site)
    shard, row = np.divmod(np.arange(layout.rows), layout.shards)[::-1]
    table = np.full(layout.shape, np.nan, np.float32)
    table[shard, row] = TABLES[site.name]
    return table


def expected(tokens, positions=None, addressing=ADDRESSING):
    ids = addressing.ids(jnp.asarray(tokens), None if positions is None else jnp.asarray(positions))
    return {layer: TABLES[site][ids[site]] for layer, site in addressing.layers.items()}


def positions_of(tokens):
    positions = np.zeros(tokens.shape, np.int32)
    for column in range(1, tokens.shape[1]):
        positions[:, column] = np.where(
            tokens[:, column - 1] == END, 0, positions[:, column - 1] + 1)
    return positions


@pytest.fixture(name="source")
def makes_and_closes_sources(tmp_path):
    """A source of the same rows, of each kind."""
    with contextlib.ExitStack() as stack:
        def source(kind="host", end_id=None, **changed):
            if kind == "device":
                tables = {site.name: jnp.asarray(sharded(site)) for site in ADDRESSING.sites}
                return DeviceRows(CONFIG, ADDRESSING, tables, end_id)
            homes = {name: host_table(table) for name, table in TABLES.items()}
            if kind != "host":
                for name, table in TABLES.items():
                    write_table(tmp_path / name, table, addressing=ADDRESSING, site=name)
                    homes[name] = open_table(tmp_path / name, ADDRESSING, name,
                                             cache_bytes=2**12 if kind == "cached" else 0)
            rows = HostRows(ADDRESSING, {**homes, **changed}, end_id,
                            cache_bytes=2**12 if kind == "cached" else 0)
            return stack.enter_context(contextlib.closing(rows))

        yield source


def assert_same(rows, right):
    assert rows.keys() == right.keys()
    for layer, expected_BTHC in right.items():
        np.testing.assert_array_equal(rows[layer], expected_BTHC)


KINDS = ("device", "host", "disk", "cached")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_each_layer(kind, source):
    rows = source(kind)
    assert_same(rows(TEXT), expected(TEXT))
    assert_same(rows(jnp.asarray(TEXT)), expected(TEXT))
    chunk = rows(TEXT[:, 5:], history=TEXT[:, 3:5])
    assert_same(chunk, {layer: each[:, 5:] for layer, each in expected(TEXT).items()})
    positions = np.tile(np.arange(4, dtype=np.int32), (3, 3))
    assert_same(rows(TEXT, positions=positions), expected(TEXT, positions))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_end_behind_their_token(kind, source):
    rows = source(kind, END)
    right = expected(TEXT, positions_of(TEXT))
    assert_same(rows(TEXT), right)
    assert_same(rows(TEXT[:, 4:], history=TEXT[:, 2:4]),
                {layer: each[:, 4:] for layer, each in right.items()})
    assert not np.array_equal(right[2], expected(TEXT)[2])


@pytest.mark.parametrize("ahead", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_with_their_rows(kind, ahead, source):
    batches = [TEXT[:, :4], TEXT[:2, 4:], TEXT[:, 3:6]]
    seen = list(source(kind).prefetched(iter(batches), ahead))
    assert len(seen) == 3
    for (tokens, rows), batch in zip(seen, batches, strict=True):
        assert tokens is batch
        assert_same(rows, expected(batch))


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_a_text_go_on(kind, size, source):
    """Across the ends of documents, too; the first has nothing before it."""
    chunks = [TEXT[:, start:start + size] for start in range(0, 12, size)]
    parts = [rows for _, rows in source(kind, END).prefetched(chunks, continued=True)]
    for layer, right in expected(TEXT, positions_of(TEXT)).items():
        np.testing.assert_array_equal(
            np.concatenate([rows[layer] for rows in parts], axis=1), right)


def test_one_table_feeds_all_its_layers():
    config = EngramConfig(layers=(2, 5), rows_per_head=(64, 128), heads=2, head_dim=8,
                          one_table=True, vocab_size=VOCAB)
    addressing = address(config)
    assert addressing.layers == {2: "layer_2", 5: "layer_2"}
    site, = addressing.sites
    table = np.random.default_rng(0).standard_normal((site.rows, 8)).astype(np.float32)
    with contextlib.closing(HostRows(addressing, {"layer_2": host_table(table)})) as rows:
        both = rows(TEXT)
    np.testing.assert_array_equal(both[2], both[5])


def test_the_next_batch_is_fetched_while_this_one_is_used(source):
    """Both are asked for before the first is given; the third is not."""
    seen = []

    class Noting(HostTable):
        def lookup(self, ids_U, out=None):
            seen.append(threading.current_thread().name)
            return super().lookup(ids_U, out)

    home = Noting(RowFormat("float32", 8), host_table(TABLES["layer_2"]).packed_RB)
    rows = source(layer_2=home)
    batches = rows.prefetched([TEXT, TEXT, TEXT])
    next(batches)
    rows._worker.submit(lambda: None).result()
    assert seen == ["rows_0"] * 2
    assert len(list(batches)) == 2
    assert len(seen) == 3


class Breaks(HostTable):
    """A home that fails at one look-up."""

    def lookup(self, ids_U, out=None):
        self.left -= 1
        if self.left == 0:
            raise MachineError("the disk is gone")
        return super().lookup(ids_U, out)


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_an_error_is_raised_at_its_batch_and_the_rest_come(ahead, source):
    home = Breaks(RowFormat("float32", 8), host_table(TABLES["layer_5"]).packed_RB)
    home.left = 2
    batches = source(layer_5=home).prefetched([TEXT, TEXT[:, 2:], TEXT[:, 4:]], ahead)
    assert_same(next(batches)[1], expected(TEXT))
    with pytest.raises(MachineError, match="the disk is gone"):
        next(batches)
    assert_same(next(batches)[1], expected(TEXT[:, 4:]))
    assert next(batches, None) is None


@pytest.mark.parametrize("bad", [np.array([[1, VOCAB]]), np.array([[0.5]]), np.array([1])])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_behind_a_bad_one_come(kind, bad, source):
    batches = source(kind).prefetched([TEXT, bad, TEXT[:, 2:], bad, TEXT[:, 4:]])
    assert_same(next(batches)[1], expected(TEXT))
    for start in (2, 4):
        with pytest.raises(UserError, match=r"token id = 300|tokens = '"):
            next(batches)
        assert_same(next(batches)[1], expected(TEXT[:, start:]))
    assert next(batches, None) is None


def test_an_error_of_the_batches_themselves_comes_at_its_turn(source):
    def failing():
        yield TEXT
        yield TEXT[:, 2:]
        raise MachineError("the text is gone")

    batches = source().prefetched(failing(), ahead=9)
    assert [tokens.shape[1] for tokens, _ in (next(batches), next(batches))] == [12, 10]
    with pytest.raises(MachineError, match="the text is gone"):
        next(batches)
    assert next(batches, None) is None


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_behind_a_bad_one_never_have_the_rows_of_another_text(kind, source):
    """Those that reach the bad token are refused; behind what is no chunk at all nothing comes."""
    bad = TEXT[:, 4:6].copy()
    bad[1, 1] = VOCAB
    chunks = [TEXT[:, :4], bad, TEXT[:, 6:8], TEXT[:, 8:]]
    batches = source(kind).prefetched(chunks, continued=True)
    next(batches)
    for line in ("token id = 300", "history = 300"):
        with pytest.raises(UserError, match=line):
            next(batches)
    assert_same(next(batches)[1], {layer: rows[:, 8:] for layer, rows in expected(TEXT).items()})
    for no_chunk in (TEXT[:, 4:6] / 2, TEXT[:2, 4:6]):
        batches = source(kind).prefetched([TEXT[:, :4], no_chunk, TEXT[:, 6:]], continued=True)
        next(batches)
        with pytest.raises(UserError, match=r"tokens = '.*': must be whole numbers \[3, T\]"):
            next(batches)
        assert next(batches, None) is None


@pytest.mark.parametrize("end_id", [None, END])
def test_errors_of_the_tokens_are_raised_where_rows_are_waited_for(end_id, source):
    rows = source(end_id=end_id)
    for tokens, history, line in [
        (np.array([[1, VOCAB]]), None, "token id = 300: must be in 0..299"),
        (np.array([[-1]]), None, "token id = -1: must be in 0..299"),
        (np.array([[1]]), np.array([[1, VOCAB]]), "history = 300: must be in -1..299"),
        (np.array([[1]]), np.array([[1]]), r"history = 'int64 \(1, 1\)'"),
        (np.array([1]), None, r"tokens = 'int64 \(1,\)': must be whole numbers \[B, T\]"),
        (np.array([[0.5]]), None, r"tokens = 'float64 \(1, 1\)'"),
        (np.array([[1]]), [[1, 2]], "history = 'list': must be a NumPy or jax array"),
    ]:
        with pytest.raises(UserError, match=line):
            rows(tokens, history)
        with pytest.raises(UserError, match=line):
            rows.request(tokens, history)["layer_5"]
    for kind in ("host", "device"):
        with pytest.raises(UserError, match=r"positions = 'int32 \(3, 11\)': must be .* \(3, 12\)"):
            source(kind)(TEXT, positions=TEXT[:, 1:])
        with pytest.raises(UserError, match=r"history = 'int32 \(2, 2\)': must be .* \(3, 2\)"):
            source(kind, END)(TEXT, history=TEXT[:2, :2])
    with pytest.raises(UserError, match="ahead = 0: must be a whole number, at least"):
        rows.prefetched([TEXT], ahead=0)
    with pytest.raises(UserError, match=r"tokens = 'int32 \(2, 12\)': must be .* \[3, T\]"):
        list(rows.prefetched([TEXT, TEXT[:2]], continued=True))
    assert_same(rows(TEXT), expected(TEXT, None if end_id is None else positions_of(TEXT)))


@pytest.mark.parametrize("end_id", [VOCAB, -1, 1.5, "a", True])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_document_ends_with_a_token_of_the_vocabulary(kind, end_id, source):
    """With another one no end would ever be seen."""
    with pytest.raises(UserError, match=rf"end_id = {end_id!r}: must be a raw token id, in 0..299"):
        source(kind, end_id)
    assert source(kind, np.int64(VOCAB - 1)).end_id == VOCAB - 1


def test_a_closed_source_is_one_line(source):
    rows = source()
    rows.close()
    for use in (lambda: rows(TEXT), lambda: rows.fill(TEXT[0]),
                lambda: next(rows.prefetched([TEXT]))):
        with pytest.raises(UserError, match="rows: their source has been closed"):
            use()


# --- The addressing of a network that is not ours ---


def test_ids_that_the_vocabulary_does_not_have_are_refused():
    for tokens in (np.array([[VOCAB]]), jnp.array([[3, -5]])):
        with pytest.raises(UserError, match=r"token id = .*: must be in 0..299, the tokenizer's"):
            ADDRESSING.ids(tokens)
    with pytest.raises(UserError, match=r"history = 300: must be in -1..299"):
        ADDRESSING.ids(TEXT[:1], history_BP=np.array([[1, VOCAB]]))
    with pytest.raises(UserError, match=r"history.shape = \(3, 1\): must be \[B, 2 or more\]"):
        ADDRESSING.ids(TEXT, history_BP=TEXT[:, :1])


def test_the_start_of_a_text_is_a_history_of_nothing():
    nothing = np.full((3, 2), -1, np.int32)
    for name, ids in jax.jit(ADDRESSING.ids)(TEXT, None, nothing).items():
        np.testing.assert_array_equal(ids, ADDRESSING.ids(TEXT)[name])


@pytest.mark.parametrize("pad_id", [-1, VOCAB])
def test_a_pad_id_is_a_raw_id_of_the_vocabulary(pad_id):
    """The canonical one is looked up; a raw id may be larger than any canonical one."""
    vocabulary = CompressedVocabulary(np.arange(VOCAB) // 2)
    assert address(CONFIG, vocabulary, 299).hashes["layer_2"].pad_id == 149
    assert address(CONFIG, vocabulary).hashes["layer_2"].pad_id == CONFIG.pad_id // 2
    with pytest.raises(UserError, match=rf"pad_id = {pad_id}: must be a raw token id, in 0..299"):
        address(CONFIG, vocabulary, pad_id)


# --- A table that somebody has ---


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("shape", ["rows", "shards", "jax", "bits"])
def test_an_array_becomes_a_file_and_a_home(shape, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("engram_jax.offload.arrays._PACKED_AT_ONCE", 50)
    site = ADDRESSING.sites[0]
    right = TABLES[site.name]
    if shape == "bits":
        right = np.asarray(jnp.asarray(right, jnp.bfloat16), np.float32)
    table = {"rows": right, "shards": sharded(site), "jax": jnp.asarray(sharded(site)),
             "bits": np.asarray(jnp.asarray(right, jnp.bfloat16)).view(np.uint16)}[shape]
    info = write_table(tmp_path / "t", table, dtype, addressing=ADDRESSING, site=site.name)
    packed = info.format.pack(right)
    ids = np.arange(site.rows)
    for home in (open_table(tmp_path / "t", ADDRESSING, site.name),
                 open_table(tmp_path / "t", ADDRESSING, site.name, memory="host"),
                 open_table(tmp_path / "t"), host_table(table, dtype, rows=site.rows)):
        assert home.format == RowFormat(dtype, 8)
        np.testing.assert_array_equal(home.lookup(ids), packed)
        home.close()


def test_folders_of_a_table_are_made(tmp_path):
    path = tmp_path / "no" / "folder" / "t"
    assert write_table(path, TABLES["layer_2"]).rows == 406
    open_table(path).close()


def test_a_cache_in_front_of_a_file(tmp_path):
    write_table(tmp_path / "t", TABLES["layer_2"], addressing=ADDRESSING, site="layer_2")
    home = open_table(tmp_path / "t", ADDRESSING, "layer_2", cache_bytes=2**12)
    assert (type(home), home.group) == (CachedTable, CONFIG.heads)
    home.close()
    for arguments in ({"memory": "host"}, {"addressing": None}):
        with pytest.raises(UserError, match="cache_bytes = 4096: is of a table on disk, and needs"):
            open_table(tmp_path / "t", **{"addressing": ADDRESSING, "site": "layer_2",
                                          "cache_bytes": 4096, **arguments})


@pytest.mark.parametrize(("table", "more", "line"), [
    (np.zeros((5, 8), np.float32), {}, r"table = 'float32 \(5, 8\)': must have the 406 rows and 8"),
    (np.zeros((406, 9), np.float32), {}, r"must have the 406 rows and 8 columns of layer_2"),
    (np.zeros((406, 8), np.int32), {}, r"table = 'int32 \(406, 8\)': must be \[rows, dim\] or"),
    (np.zeros(406, np.float32), {}, r"table = 'float32 \(406,\)': must be \[rows, dim\] or"),
    ([[1.0]], {}, "table = 'list': must be .* a NumPy or jax array"),
    (np.zeros((4, 9, 8), np.float32), {}, r"rows = 406: must be in 1..36"),
    (np.full((406, 8), np.nan, np.float32), {}, "must be finite"),
    (TABLES["layer_2"], {"site": "layer_3"}, "site = 'layer_3': must be one of layer_2, layer_5"),
    (TABLES["layer_2"], {"dtype": "fp4"}, "dtype = 'fp4': must be one of float32"),
    (TABLES["layer_2"], {"rows": 3}, "rows = 3: must be 406, as the table has")])
def test_what_is_no_table_of_the_site_is_refused(table, more, line, tmp_path):
    with pytest.raises(UserError, match=line):
        write_table(tmp_path / "t", table, **{
            "addressing": ADDRESSING, "site": "layer_2", **more})
    assert not list(tmp_path.iterdir())


def test_padding_must_be_told_apart_where_nobody_knows_the_rows(tmp_path):
    table = sharded(ADDRESSING.sites[0])
    with pytest.raises(UserError, match=r"rows = 0: must be in 1..408: how many of the rows are"):
        write_table(tmp_path / "t", table)
    assert write_table(tmp_path / "t", table, rows=406).rows == 406


@pytest.mark.parametrize("cache_bytes", [1e6, "a", 5])
def test_a_cache_has_a_whole_number_of_bytes(cache_bytes, tmp_path):
    write_table(tmp_path / "t", TABLES["layer_2"], addressing=ADDRESSING, site="layer_2")
    line = rf"capacity_bytes = {cache_bytes!r}: must be a whole number, at least 512"
    with pytest.raises(UserError, match=line):
        open_table(tmp_path / "t", ADDRESSING, "layer_2", cache_bytes=cache_bytes)
    homes = {name: host_table(table) for name, table in TABLES.items()}
    with pytest.raises(UserError, match=line):
        HostRows(ADDRESSING, homes, cache_bytes=cache_bytes)


def test_what_is_no_home_is_refused():
    home = host_table(TABLES["layer_2"])
    with pytest.raises(UserError, match=r"homes\['layer_2'\] = 'my.table': must be a home, as"):
        HostRows(ADDRESSING, {"layer_2": "my.table", "layer_5": "my.table"})
    with pytest.raises(UserError, match="homes = 'HostTable': must be a home for the name of each"):
        HostRows(ADDRESSING, home)


def test_a_home_of_another_table_is_refused(tmp_path):
    homes = {name: host_table(table) for name, table in TABLES.items()}
    with pytest.raises(UserError, match="homes = 'layer_5': has no home; every site needs one"):
        HostRows(ADDRESSING, {"layer_2": homes["layer_2"]})
    with pytest.raises(UserError, match=r"homes\['layer_2'\] = \(5, 8\): rows and columns; .*406"):
        HostRows(ADDRESSING, {**homes, "layer_2": host_table(TABLES["layer_2"][:5])})
    other = address(CONFIG, pad_id=9)
    write_table(tmp_path / "t", TABLES["layer_2"], addressing=other, site="layer_2")
    for memory in ("disk", "host"):
        with contextlib.closing(open_table(tmp_path / "t", memory=memory)) as home, pytest.raises(
                UserError, match=r"homes\['layer_2'\] = .*: is the fingerprint of another hash"):
            HostRows(ADDRESSING, {**homes, "layer_2": home})
    with pytest.raises(UserError, match=r"hash.pad_id = 9: this model needs 2"):
        open_table(tmp_path / "t", ADDRESSING, "layer_2")
