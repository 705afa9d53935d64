"""DeepSeek-V4.1's memory: the bits of its tables, its arithmetic in float64, what is refused."""

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import v41

from engram_jax.errors import MachineError, UserError
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.interop.deepseek import open_deepseek
from engram_jax.interop.float8 import decode_blocks, decode_e8m0
from engram_jax.interop.layers import fuse_v41, layer_of
from engram_jax.interop.released import open_released, stretches, write_released
from engram_jax.offload import HostRows

TOKENS_BT = np.random.default_rng(3).integers(0, 24, (2, 19)).astype(np.int32)
TOKENS_BT[0, 5] = v41.IMAGE


@pytest.fixture(scope="module", name="theirs")
def a_checkpoint(tmp_path_factory):
    return v41.write(tmp_path_factory.mktemp("v41") / "theirs")


# --- Bits ---


def e4m3(byte):
    """The format's definition, in Python's integers."""
    sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0**(exponent - 10))


def test_e8m0_is_a_power_of_two_from_2_to_the_minus_127_up_and_255_is_nan():
    decoded = decode_e8m0(np.arange(256))
    assert decoded.dtype == np.float32
    assert decoded[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert np.isnan(decoded[255])


def test_every_product_of_an_e4m3_and_an_e8m0_byte_is_decoded_to_the_bit():
    weight = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    decoded = decode_blocks(weight, np.arange(256, dtype=np.uint8)[:, None])
    exact = np.array([[e4m3(byte) for byte in range(256)]]) * np.array(
        [*(2.0 ** (byte - 127) for byte in range(255)), np.nan])[:, None]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(decoded, exact.astype(np.float32))
    signs = ~np.isnan(exact)
    np.testing.assert_array_equal(np.signbit(decoded)[signs], np.signbit(exact)[signs])


@pytest.mark.parametrize("shape", [(3, 2), (2, 0), (4,)])
def test_blocks_that_do_not_divide_a_weight_are_refused(shape):
    with pytest.raises(UserError, match=r"scale.shape = .*: must divide the weight's \(8, 4\)"):
        decode_blocks(np.zeros((8, 4), np.uint8), np.zeros(shape, np.uint8))


# --- In ---


@pytest.mark.parametrize("home", ["shards", "disk", "host"])
def test_rows_keep_their_bits_and_scales_in_every_home(theirs, tmp_path, home):
    released = open_deepseek(theirs)
    if home != "shards":
        write_released(released, tmp_path / "ours")
        released.close()
        released = open_released(tmp_path / "ours", home)
    for layer in v41.LAYERS:
        table, name = released.tables[layer], f"layers.{layer}.engram.embed."
        both = np.concatenate([v41.tensors()[name + end][1] for end in ("weight", "scale")], axis=1)
        assert table.rows == len(both)
        np.testing.assert_array_equal(np.concatenate(list(stretches(table))), both)
        ids = np.random.default_rng(0).integers(0, table.rows, 300)
        np.testing.assert_array_equal(table.lookup(ids), both[ids])
        scale_RC = np.repeat(both[:, -2:], 32, axis=1)
        exact = both[:, :-2].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.ldexp(
            1.0, scale_RC.astype(int) - 127)
        exact[scale_RC == 255] = np.nan
        exact[np.abs(exact) < 2.0**-126] = 0  # where devices have no smaller numbers
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(
                jax.jit(table.format.unpack)(table.lookup(np.arange(table.rows))),
                exact.astype(np.float32))
    released.close()


def test_what_is_read_is_what_the_shards_hold(theirs):
    released, tensors = open_deepseek(theirs), v41.tensors()
    for layer in v41.LAYERS:
        params, name = released.params[layer], f"layers.{layer}.engram."
        np.testing.assert_array_equal(params["query_gain"], tensors[f"{name}q_weight"][1])
        np.testing.assert_array_equal(params["key_gain"], tensors[f"{name}k_weight"][1])
        bytes_, scale = (tensors[f"{name}wkv.{end}"][1] for end in ("weight", "scale"))
        for block, row, column in ((0, 3, 7), (1, 40, 380), (2, 63, 200)):  # keys, then the value
            at = block * v41.WIDTH + row
            assert params["project"][block, column, row] == e4m3(int(bytes_[at, column])) * (
                2.0 ** (int(scale[at // 32, column // 32]) - 127))
    assert released.config.kernel == 0
    assert released.config.norm_eps == 1e-20
    assert released.memory.dead_ids == (v41.IMAGE,)
    assert released.memory.vocabulary.size < v41.tokenizer().get_vocab_size()  # it does merge
    released.close()


def test_both_spellings_of_the_config_are_the_same_memory(theirs, tmp_path):
    one = open_deepseek(theirs)
    other = open_deepseek(v41.write(tmp_path / "flat", config=v41.values(nested=False), shards=1))
    assert (one.memory, one.config, one.width) == (other.memory, other.config, other.width)
    one.close()
    other.close()


def test_a_known_hash_takes_the_place_of_the_tokenizer(theirs, tmp_path):
    released = open_deepseek(theirs)
    released.artifact().write(tmp_path / "hash.json")
    bare = v41.write(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    again = open_deepseek(bare, tmp_path / "hash.json")
    assert again.memory.fingerprint == released.memory.fingerprint
    assert again.memory.dead_ids == released.memory.dead_ids
    with pytest.raises(UserError, match="there is no such file; the token map comes from it"):
        open_deepseek(bare)


@pytest.mark.parametrize(("change", "line"), [
    ({"variant": "qwen"}, "variant = 'qwen': must be deepseek, the config's"),
    ({"layers": (1,)}, r"layers = \(1,\): must be \(1, 3\)"),
    ({"heads": 3}, "heads = 3: must be 2"),
    ({"rows_per_head": (101,) * 2}, "orders = 3: must be 4"),
    ({"dead_ids": ()}, r"dead_ids = \(\): must be \(11,\)"),
])
def test_a_known_hash_of_another_memory_is_refused(theirs, tmp_path, change, line):
    with contextlib.closing(open_deepseek(theirs)) as released:
        memory = released.memory
    own = {name: value for name, value in change.items() if name != "dead_ids"}
    memory = dataclasses.replace(
        memory, hashing=dataclasses.replace(memory.hashing, **own),
        dead_ids=change.get("dead_ids", memory.dead_ids))
    other = dataclasses.replace(memory, hashing=dataclasses.replace(
        memory.hashing, layers=(3,))) if "layers" in change else memory
    HashArtifact(memories={"layer_1": memory, "layer_3": other},
                 layers={"layer_1": 1, "layer_3": 3}).write(tmp_path / "hash.json")
    with pytest.raises(UserError, match=line):
        open_deepseek(theirs, tmp_path / "hash.json")


@pytest.mark.parametrize("change", ["no sums", "another layer"])
def test_a_folder_that_says_too_little_is_one_line(theirs, tmp_path, change):
    with contextlib.closing(open_deepseek(theirs)) as released:
        write_released(released, tmp_path / "ours")
        kept = released.artifact()
    values = json.loads((tmp_path / "ours/config.json").read_text())
    if change == "no sums":
        values["sha256"] = {}
    else:
        dataclasses.replace(kept, memories={"layer_1": kept.memories["layer_1"]},
                            layers={"layer_1": 1}).write(tmp_path / "ours/hash.json")
        values["sha256"]["hash.json"] = hashlib.sha256(
            (tmp_path / "ours/hash.json").read_bytes()).hexdigest()
    (tmp_path / "ours/config.json").write_text(json.dumps(values))
    line = {"no sums": r"sha256 = \[\]: must be of hash.json, fusion.safetensors",
            "another layer": r"hash.json: layers = \[1\]: must be those of config.json, \[1, 3\]"}
    with pytest.raises(UserError, match=line[change]):
        open_released(tmp_path / "ours")


def test_rows_keep_their_order_from_stretch_to_stretch(theirs, monkeypatch):
    """A table of the released size comes in thousands of stretches, this one elsewhere in one."""
    monkeypatch.setattr("engram_jax.interop.shards._AT_ONCE", 7 * 66)
    with contextlib.closing(open_deepseek(theirs)) as released:
        table = released.tables[1]
        pieces = list(table.stretches())
        assert len(pieces) > 90
        np.testing.assert_array_equal(np.concatenate(pieces), table.lookup(np.arange(table.rows)))


def test_a_disk_that_fails_while_rows_are_read_is_one_line(theirs, monkeypatch):
    def broken(*arguments):
        raise OSError(5, "Input/output error")
    with contextlib.closing(open_deepseek(theirs)) as released:
        monkeypatch.setattr("os.preadv", broken)
        for read in (lambda table: table.lookup(np.array([3])), lambda table: [*table.stretches()]):
            with pytest.raises(MachineError, match=r"could not be read \(Input/output error\)"):
                read(released.tables[1])


# --- The layer ---


def by_hand(params, hidden, rows, dead):
    """The layer's arithmetic in float64, a token and a stream at a time."""
    delta = np.zeros(hidden.shape)
    project = params["project"].astype(np.float64)
    scores = np.zeros(hidden.shape[:3])
    for b, t, m in np.ndindex(*hidden.shape[:3]):
        memory = rows[b, t].reshape(-1).astype(np.float64)
        key, value, h = memory @ project[m], memory @ project[-1], hidden[b, t, m]
        query = h / np.sqrt((h * h).mean() + 1e-20) * params["query_gain"][m]
        key = key / np.sqrt((key * key).mean() + 1e-20) * params["key_gain"][m]
        scores[b, t, m] = score = (query * key).sum() / np.sqrt(len(h))
        root = np.copysign(np.sqrt(max(abs(score), 1e-6)), score)
        delta[b, t, m] = 0 if dead[b, t] else value / (1 + np.exp(-root))
    return delta, scores


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_the_layer_is_its_arithmetic_in_float64(dtype, most):
    """With scores of exactly 0, and some at the clamp."""
    random = np.random.default_rng(0)
    streams, width, orders, columns = 4, 48, 6, 32
    rows = random.integers(-8, 9, (2, 7, orders, columns)).astype(np.float32) / 8
    params = {
        "project": random.integers(-7, 8, (streams + 1, orders * columns, width)).astype(
            np.float32) / 64,
        "query_gain": random.integers(1, 9, (streams, width)).astype(np.float32) / 4,
        "key_gain": random.integers(1, 9, (streams, width)).astype(np.float32) / 4}
    hidden = random.standard_normal((2, 7, streams, width)).astype(np.float32)
    hidden[0, 0] = 0  # scores of exactly 0
    rows[0, 1] = 0  # keys of 0, and a value of 0
    params["key_gain"][1] *= 1e-7  # the second stream's scores are below the clamp
    hidden = np.asarray(jnp.asarray(hidden, dtype).astype(jnp.float32))
    dead = np.zeros((2, 7), bool)
    dead[1, 3] = True
    expected, scores = by_hand(params, hidden.astype(np.float64), rows, dead)
    assert (scores[0, 0] == 0).all()
    assert (np.abs(scores[:, :, 1]) < 1e-6).all()
    assert np.abs(scores[1, :, 0]).min() > 1e-6
    ours = jax.jit(fuse_v41, static_argnums=3)(
        jax.tree.map(jnp.asarray, params), jnp.asarray(hidden, dtype), jnp.asarray(rows), 1e-20,
        jnp.asarray(dead))
    assert ours.dtype == jnp.float32
    worst = np.abs(ours - expected).max() / np.abs(expected).max()
    assert worst < most, worst
    assert not ours[1, 3].any()
    # 1 / (1 + exp(-0.001)) and not a half: a score of zero counts as positive.
    value = rows[0, 0].reshape(-1) @ params["project"][-1]
    np.testing.assert_allclose(ours[0, 0, 0], value / (1 + np.exp(-1e-3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("home", ["disk", "host"])
def test_the_flax_layer_reads_its_home_whole_and_token_by_token(tmp_path, home):
    tensors = v41.tensors()
    for name, (dtype, array) in tensors.items():  # scales that keep the rows finite
        if name.endswith("embed.scale"):
            tensors[name] = dtype, array % 8 + 120
        if name.endswith("embed.weight"):
            tensors[name] = dtype, np.where(array % 128 == 127, 3, array).astype(np.uint8)
    released = open_deepseek(v41.write(tmp_path / "theirs", tensors))
    write_released(released, tmp_path / "ours")
    released.close()
    released = open_released(tmp_path / "ours", home)
    hidden = np.random.default_rng(1).standard_normal((2, 19, v41.STREAMS, v41.WIDTH)).astype(
        np.float32)
    for layer in v41.LAYERS:
        module, variables = layer_of(released, layer)
        apply = jax.jit(module.apply)
        whole = apply(variables, hidden, TOKENS_BT)
        ids = released.memory.table_ids_numpy(TOKENS_BT, layer)
        table = released.tables[layer]
        rows = table.format.unpack_numpy(table.lookup(ids.reshape(-1)))
        expected, _ = by_hand(released.params[layer], hidden.astype(np.float64),
                              rows.reshape(*ids.shape, -1), TOKENS_BT == v41.IMAGE)
        np.testing.assert_allclose(whole - hidden, expected, rtol=0,
                                   atol=2e-6 * np.abs(expected).max())
        padded = np.pad(TOKENS_BT, ((0, 0), (3, 0)), constant_values=-1)
        steps = [apply(variables, hidden[:, t:t + 1], TOKENS_BT[:, t:t + 1], padded[:, t:t + 3])
                 for t in range(19)]
        np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0,
                                   atol=2e-6 * np.abs(whole).max())
        assert (np.asarray(whole)[0, 5] == hidden[0, 5]).all()  # the image's gates are shut
    released.close()


# --- What is refused ---


def config(**fields):
    def change(folder):
        values = v41.values()
        for name, value in fields.items():
            where = values if name == "image_token_id" else values["text_config"]
            where[name] = value
            if value == "gone":
                del where[name]
        (folder / "config.json").write_text(json.dumps(values))
    return change


def tensor(end, dtype, *shape):
    """The checkpoint with another tensor whose name ends so; none of no dtype."""
    def change(folder):
        chosen = v41.tensors()
        name = f"layers.3.engram.{end}"
        if dtype:
            itemsize = {"F32": 4}.get(dtype, 1)
            chosen[name] = dtype, np.zeros(shape, np.float32 if itemsize == 4 else np.uint8)
        else:
            del chosen[name]
        v41.write(folder, chosen)
    return change


def cut(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def other_tokenizer(folder):
    made = json.loads((folder / "tokenizer.json").read_text())
    made["model"]["vocab"] = {word.replace("The", "thy"): number
                              for word, number in made["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(made))


@pytest.mark.parametrize(("change", "line"), [
    (config(engram_num_embeddings=[650, 700]), r"engram_num_embeddings = .*: the primes sum to \["),
    (config(engram_vocab_size=103), "the primes sum to"),
    (config(engram_pad_id=3), "engram_pad_token_id = {.*}: is given twice and differently"),
    (config(engram_max_ngram_size=10**12), r"engram_max_ngram_size = .*: must be in 2\.\.64"),
    (config(engram_n_heads="gone"), "engram_n_heads = None: is missing"),
    (config(hidden_size="gone"), r"hidden_size = None: is missing \(or dim\)"),
    (config(engram_layer_ids=3), "engram_layer_ids = 3: must be a list of whole numbers"),
    (config(engram_layer_ids=[1, 2]), r"engram_num_embeddings|layers\.2\.engram"),
    (config(engram_pad_token_id=77), r"engram_pad_token_id = 77: must be a token id, in 0\.\.23"),
    (config(image_token_id=99), r"dead_ids = 99: must be a raw token id"),
    (config(image_token_id="x"), "image_token_id = 'x': must be a token id"),
    (config(vocab_size=30), "token map = 24: tokens; vocab_size is 30"),
    (other_tokenizer, "tokenizer.json: canonical ids = .*: engram_compressed_vocab_size is"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no tokenizer"),
    (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"), "is no tokenizer"),
    (tensor("embed.weight", "F8_E4M3", 7, 64), r"embed.weight: shape = \(7, 64\): must be"),
    (tensor("embed.weight", "U8", 650, 64), "embed.weight: dtype = 'U8'"),
    (tensor("embed.scale", "F8_E8M0", 9, 2), r"embed.scale: shape = \(9, 2\): must be"),
    (tensor("embed.scale", None), "holds no tensor 'layers.3.engram.embed.scale'"),
    (tensor("wkv.weight", "F8_E4M3", 128, 384), r"wkv.weight: shape = .*must be \(192, 384\)"),
    (tensor("wkv.weight", "F32", 192, 384), "wkv.weight: dtype = 'F32': must be F8_E4M3"),
    (tensor("wkv.scale", "F8_E8M0", 7, 12), "scale.shape = .*: must divide the weight's"),
    (tensor("q_weight", "I8", 2, 64), "q_weight: dtype = 'I8': must be one of F64, F32"),
    (cut, "its header promises [0-9]+: it is cut short"),
    (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
     "names model-00002-of-00002.safetensors, which is missing"),
])
def test_what_cannot_be_imported_is_one_line(change, line, tmp_path):
    folder = v41.write(tmp_path / "theirs")
    change(folder)
    with pytest.raises(UserError, match=line) as caught:
        open_deepseek(folder)
    assert "\n" not in str(caught.value)


# --- The released size ---

FULL_SIZE = r"""
import re, sys
import numpy as np
from engram_jax.interop.safetensors import open_tensors
from engram_jax.interop.shards import Part, ShardTable

tensors = open_tensors(sys.argv[1])
table = ShardTable([Part(tensors["embed.weight"], tensors["embed.scale"])], 384_006_168)
ids = np.array([384_006_167, 0, 200_000_000, 1, 384_006_167])
np.save(sys.argv[2], table.lookup(ids))
print(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])  # since exec
"""


def test_a_table_of_the_released_size_opens_and_gives_the_rows_of_both_ends(tmp_path):
    """384,006,168 rows in a sparse file: 101 GB by its length, a few kilobytes on the disk."""
    rows, columns, scales = 384_006_168, 256, 8
    released = NgramHash(rows_per_head=(16_000_000,) * 3, heads=8, layers=(1,), vocab_size=99092,
                         pad_id=2)
    assert released.table_rows[1] == rows
    parts = {"embed.weight": ("F8_E4M3", columns), "embed.scale": ("F8_E8M0", scales)}
    fields, stop = {}, 0
    for name, (dtype, width) in parts.items():
        start, stop = stop, stop + rows * width
        fields[name] = {"dtype": dtype, "shape": [rows, width], "data_offsets": [start, stop]}
    header = json.dumps(fields).encode()
    written = np.random.default_rng(0).integers(0, 256, (4, columns + scales)).astype(np.uint8)
    path = tmp_path / "full.safetensors"
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + stop)
            for row, bytes_ in zip((0, 1, rows - 1), written, strict=False):
                for name, (_, width) in parts.items():
                    file.seek(8 + len(header) + fields[name]["data_offsets"][0] + row * width)
                    own = bytes_[:columns] if name == "embed.weight" else bytes_[columns:]
                    file.write(own.tobytes())
    except OSError as error:
        pytest.skip(f"no sparse file of {stop} bytes here: {error}")
    done = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, path, tmp_path / "rows.npy"], check=True, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    expected = np.stack([written[2], written[0], np.zeros_like(written[0]), written[1], written[2]])
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), expected)
    resident = int(done.stdout) * 1024
    print(f"resident: {resident / 2**20:.0f} MiB")
    assert resident < 2**30


@pytest.mark.parametrize("home", ["shards", "disk"])
def test_rows_are_sent_ahead_as_those_of_our_own_tables(theirs, tmp_path, home):
    released = open_deepseek(theirs)
    if home == "disk":
        write_released(released, tmp_path / "ours")
        released.close()
        released = open_released(tmp_path / "ours")
    homes = {f"layer_{layer}": released.tables[layer] for layer in v41.LAYERS}
    with HostRows(released.artifact().addressing(released.config), homes) as source:
        sent = source(TOKENS_BT[1:])  # without the image
        for layer in v41.LAYERS:
            ids = released.memory.table_ids_numpy(TOKENS_BT[1:], layer)
            table = released.tables[layer]
            rows = table.format.unpack_numpy(table.lookup(ids.reshape(-1)))
            np.testing.assert_array_equal(sent[layer], rows.reshape(*ids.shape, -1))


def test_an_imported_table_of_another_hash_is_refused(theirs, tmp_path):
    with contextlib.closing(open_deepseek(theirs)) as released:
        write_released(released, tmp_path / "ours")
        other = dataclasses.replace(released.memory, hashing=dataclasses.replace(
            released.memory.hashing, seed=1))
        dataclasses.replace(released, memory=other).artifact().write(tmp_path / "ours/hash.json")
    with pytest.raises(UserError, match=r"hash.json: sha256 = .*: is not that of the file"):
        open_released(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    config["sha256"]["hash.json"] = hashlib.sha256(
        (tmp_path / "ours/hash.json").read_bytes()).hexdigest()
    (tmp_path / "ours/config.json").write_text(json.dumps(config))
    for home in ("disk", "host"):
        with pytest.raises(UserError, match=r"fingerprint = .*: must be .*, of hash.json"):
            open_released(tmp_path / "ours", home)
