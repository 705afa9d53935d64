"""The safetensors format: what others write, what they read of ours, and what is refused."""

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest

from engram_jax.errors import MachineError, UserError
from engram_jax.interop import safetensors
from engram_jax.interop.safetensors import Writer, open_tensors, save


def write(path, fields, data=b"", length=None):
    header = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_arrays_come_back_bit_for_bit(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"a": random.standard_normal((3, 4)).astype(np.float32), "empty": np.zeros((0, 5)),
              "bf16": random.standard_normal(7).astype(ml_dtypes.bfloat16), "scalar": np.int64(-3),
              "fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
              "bytes": np.arange(9, dtype=np.uint8), "strided": np.arange(12.0).reshape(3, 4).T}
    arrays["scalar"] = np.array(-3)
    save(tmp_path / "a.safetensors", arrays, {"made": "here"})
    tensors = open_tensors(tmp_path / "a.safetensors")
    assert tensors.metadata == {"made": "here"}
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert tensors[name].read().dtype == array.dtype
        assert tensors[name].read().tobytes() == array.tobytes()


def test_the_formats_own_library_agrees_both_ways(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(5)}
    save(tmp_path / "ours.safetensors", arrays)
    theirs.save_file(arrays, tmp_path / "theirs.safetensors", {"x": "y"})
    loaded = theirs.load_file(tmp_path / "ours.safetensors")
    tensors = open_tensors(tmp_path / "theirs.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        np.testing.assert_array_equal(tensors[name].read(), array)


@pytest.mark.parametrize("length", [128, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path, length):
    """128 is the first byte of a pickle, and "PK" that of an archive of pickles."""
    header = json.dumps({"a": tensor()}).encode().ljust(length)
    tensors = open_tensors(write(tmp_path / "a.safetensors", header, bytes(8)))
    assert tensors["a"].shape == (2,)


@pytest.mark.parametrize(("fields", "data", "line"), [
    (b"{}{", b"", "its header is no JSON object"),
    (b"[1]", b"", "its header is no JSON object"),
    (b"\xff\xfe", b"", "its header is no JSON object"),
    (b"[" * 50_000, b"", "its header is no JSON object"),
    ({"a": tensor()}, b"1234567", "has [0-9]+ bytes, its header promises [0-9]+: it is cut short"),
    ({"a": tensor()}, b"123456789", "it is too long"),
    ({"a": tensor("F4")}, bytes(8), "a: dtype = 'F4': must be one of F64, F32"),
    ({"a": tensor(["F32"])}, bytes(8), r"a: dtype = \['F32'\]: must be one of"),
    ({"a": tensor(shape=(2, -1))}, bytes(8), r"a: shape = \[2, -1\]: must be whole numbers"),
    ({"a": tensor(shape=(True, 2))}, bytes(8), r"a: shape = .*: must be whole numbers"),
    ({"a": tensor(shape=(3,))}, bytes(8), r"a: data_offsets = .*\[3\] of F32 has 12 bytes"),
    ({"a": tensor(shape=(2**62, 2**62))}, bytes(8), "a: data_offsets = "),
    ({"a": tensor(offsets=(8, 0))}, bytes(8), "a: data_offsets = "),
    ({"a": tensor(offsets=(0, 8, 16))}, bytes(8), r"must be \[start, stop\]"),
    ({"a": tensor(offsets=(4, 12))}, bytes(12), "a: begins at byte .*, the tensor before it ends"),
    ({"a": tensor(), "b": tensor()}, bytes(8), "b: begins at byte"),
    (b'{"a": %s, "a": %s}' % ((json.dumps(tensor()).encode(),) * 2), bytes(8),
     "its header is no JSON object .*'a' stands there twice"),
    ({"a": tensor(shape=(0, 2**70), offsets=(0, 0))}, b"", r"a: shape = .*must be at most 32 axes"),
    ({"a": tensor(shape=(2, *[1] * 70))}, bytes(8), r"a: shape = .*must be at most 32 axes"),
    ({"a": 3}, bytes(8), "a = 3: must have dtype, shape and data_offsets"),
])
def test_a_header_that_is_wrong_is_one_line(tmp_path, fields, data, line):
    with pytest.raises(UserError, match=line) as caught:
        open_tensors(write(tmp_path / "a.safetensors", fields, data))
    assert "\n" not in str(caught.value)
    assert "a.safetensors" in str(caught.value)


def test_a_length_that_the_file_does_not_hold_is_refused(tmp_path):
    for length in (0, 1, 99, 2**40, 2**64 - 1):
        with pytest.raises(UserError, match="is no safetensors: a header of"):
            open_tensors(write(tmp_path / "a.safetensors", b"{}", length=length))
    (tmp_path / "a.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="a header of 0 bytes in a file of 3"):
        open_tensors(tmp_path / "a.safetensors")


def test_a_pickle_is_refused_and_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="is a pickle and no safetensors"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no safetensors; pytorch_model.bin is a pickle"):
        open_tensors(tmp_path)
    with pytest.raises(UserError, match="there is no such file or folder"):
        open_tensors(tmp_path / "none")


@pytest.mark.parametrize(("index", "line"), [
    ("[]", "is no index of shards"), ("{", "is no index of shards"),
    ('{"weight_map": {"a": 3}}', "weight_map = 'dict': must give each tensor its file"),
    ('{"weight_map": {}}', "must give each tensor its file"),
    ('{"weight_map": {"a": "b.safetensors", "a": "a.safetensors"}}', "'a' stands there twice"),
    ('{"weight_map": {"a": "../a.safetensors"}}', "must be a file beside the index"),
    ('{"weight_map": {"a": "c.safetensors"}}', r"names c\.safetensors, which is missing"),
    ('{"weight_map": {"c": "a.safetensors"}}', r"says that 'c' is in a\.safetensors; it is not"),
])
def test_an_index_that_is_wrong_is_one_line(tmp_path, index, line):
    save(tmp_path / "a.safetensors", {"a": np.zeros(3)})
    (tmp_path / safetensors.INDEX).write_text(index)
    with pytest.raises(UserError, match=line):
        open_tensors(tmp_path)


def test_an_index_whose_files_cannot_be_asked_for_is_one_line(tmp_path):
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(MachineError, match=r"could not be read \(File name too long"):
        open_tensors(tmp_path)


def test_shards_without_an_index_are_taken_together_unless_they_contradict(tmp_path):
    save(tmp_path / "a.safetensors", {"a": np.zeros(3)})
    save(tmp_path / "b.safetensors", {"b": np.ones(2)})
    assert set(open_tensors(tmp_path)) == {"a", "b"}
    save(tmp_path / "c.safetensors", {"a": np.ones(2)})
    with pytest.raises(UserError, match="holds 'a', which another shard holds, too"):
        open_tensors(tmp_path)


def test_a_file_that_fails_or_ends_early_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(
            tmp_path / "a.safetensors", {"a": ("F32", (2,))}):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "a.safetensors", {"a": np.zeros(3)})
    tensor = open_tensors(tmp_path / "a.safetensors")["a"]
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(MachineError, match="ended while it was read"):
        tensor.read()
