"""Qwen's n-gram memory: against transformers where it is, in fp8, and what is refused."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import arrays, golden_files, qwen_checkpoint

from engram_jax.errors import UserError
from engram_jax.interop import safetensors
from engram_jax.interop.layers import layer_of
from engram_jax.interop.qwen import open_qwen
from engram_jax.interop.released import open_released, write_released

GOLDEN = golden_files("qwen_ngram_0.npz")[0].values[0]
PYTHON = os.environ.get("ENGRAM_TORCH_PYTHON", sys.executable)


@pytest.fixture(scope="module", name="transformed")
def a_checkpoint_of_transformers(tmp_path_factory):
    """The folder of a tiny random qwen4_exp, by its own save_pretrained, with its outputs."""
    tried = subprocess.run([PYTHON, "-c", "import transformers.models.qwen4_exp, torch"],
                           capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"{PYTHON} has no torch and transformers with qwen4_exp; set "
                    "ENGRAM_TORCH_PYTHON")
    folder = tmp_path_factory.mktemp("qwen4_exp")
    script = pathlib.Path(__file__).with_name("make_qwen4_exp.py")
    subprocess.run([PYTHON, script, folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_of_a_saved_checkpoint_gives_the_output_of_transformers(
        transformed, layer, tmp_path):
    released = open_qwen(transformed)
    write_released(released, tmp_path / "ours")
    released = open_released(tmp_path / "ours")
    module, variables = layer_of(released, layer)
    apply = jax.jit(module.apply)
    with np.load(transformed / "outputs.npz") as file:
        outputs = dict(file)
    tokens_BT = outputs["tokens"].astype(np.int32)
    hidden = jnp.asarray(outputs["hidden"].reshape(*tokens_BT.shape, 4, -1))
    whole = np.asarray(apply(variables, hidden, tokens_BT)[0] - hidden)
    state, steps = None, []
    for at in range(tokens_BT.shape[1]):
        part = hidden[:, at:at + 1]
        after, state = apply(variables, part, tokens_BT[:, at:at + 1], state)
        steps.append(after - part)
    theirs, decoded = outputs[f"whole_{layer}"], outputs[f"steps_{layer}"]
    for ours, expected in ((whole, theirs), (np.concatenate(steps, axis=1), decoded)):
        worst = np.abs(ours.reshape(expected.shape) - expected).max() / np.abs(expected).max()
        print(f"layer {layer}: largest difference {worst:.1e} of the largest output")
        assert worst < 2e-5
    released.close()


def test_an_fp8_table_with_one_scale_keeps_its_bits_and_gives_the_scale_to_the_projections(
        tmp_path):
    meta, _, weights = arrays(GOLDEN)
    table = weights["ple_embedding.ngram_embedding.weight"]
    scale = np.float32(np.abs(table).max() / 400)
    released = open_qwen(qwen_checkpoint(tmp_path / "c", meta, weights, parts=5, scale=scale))
    layer, = released.layers
    home, rows = released.tables[layer], released.memory.hashing.table_rows[layer]
    bits = (table / scale).astype(safetensors.DTYPES["F8_E4M3"])[:rows]
    packed = home.lookup(np.arange(rows))
    np.testing.assert_array_equal(packed[:, :home.format.dim], bits.view(np.uint8))
    np.testing.assert_array_equal(home.format.unpack_numpy(packed), bits.astype(np.float32))
    value_DE = weights["value_proj.weight"]
    np.testing.assert_array_equal(released.params[layer]["project"][-1], value_DE.T * scale)
    released.close()


def test_the_hash_is_what_the_checkpoint_keeps_and_not_what_is_derived(tmp_path):
    meta, _, weights = arrays(GOLDEN)
    kept = np.array([2**62 + 1, 3, 2**61 + 5], np.int64)
    weights["ple_embedding.layer_multipliers"] = kept
    weights["ple_embedding.ngram_heads_vocab_sizes"] = np.array(meta["primes"])
    released = open_qwen(qwen_checkpoint(tmp_path / "kept", meta, weights))
    assert released.memory.hashing.multipliers[1] == tuple(kept.tolist())
    released.close()
    weights["ple_embedding.layer_multipliers"] = kept + 1
    with pytest.raises(UserError, match=r"multipliers = .*: must be odd"):
        open_qwen(qwen_checkpoint(tmp_path / "even", meta, weights))
    weights["ple_embedding.layer_multipliers"] = kept
    weights["ple_embedding.ngram_heads_vocab_sizes"] = np.array([*meta["primes"][:-1], 1009])
    with pytest.raises(UserError, match=r"its other parts = 1920: the primes sum to 2612, which "):
        open_qwen(qwen_checkpoint(tmp_path / "sums", meta, weights))


@pytest.mark.parametrize(("name", "array", "line"), [
    ("layer_multipliers", np.array([3.0, 5.0, 7.0]), "layer_multipliers: dtype = 'F64': must be I"),
    ("ngram_heads_vocab_sizes", np.ones(8, np.float32), "sizes: dtype = 'F32': must be I64"),
    ("layer_multipliers", None, r"holds no tensor '.*layer_multipliers'"),
    ("ngram_embedding.weight", np.zeros((9, 8), np.float32), "and the table as one weight, too"),
])
def test_numbers_and_tables_that_contradict_are_refused(tmp_path, name, array, line):
    meta, _, weights = arrays(GOLDEN)
    weights["ple_embedding.layer_multipliers"] = np.array([3, 5, 7])
    weights["ple_embedding.ngram_heads_vocab_sizes"] = np.array(meta["primes"])
    folder = qwen_checkpoint(tmp_path / "theirs", meta, weights, parts=5)
    path = folder / "model.safetensors"
    kept = {key: tensor.read() for key, tensor in safetensors.open_tensors(path).items()}
    prefix, = {key.split("ple_embedding.")[0] for key in kept if "ple_embedding." in key}
    kept[f"{prefix}ple_embedding.{name}"] = array
    safetensors.save(path, {key: array for key, array in kept.items() if array is not None})
    with pytest.raises(UserError, match=line):
        open_qwen(folder)


def config(**fields):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        values["text_config"].update(fields)
        (folder / "config.json").write_text(json.dumps(values))
    return change


def tensors(**fields):
    """Change a checkpoint's tensors: name after "ple." to an array, None to leave it out."""
    def change(folder):
        path = folder / "model.safetensors"
        kept = {name: tensor.read() for name, tensor in safetensors.open_tensors(path).items()}
        for end, array in fields.items():
            name, = [name for name in kept if name.endswith("." + end.replace("__", "."))]
            kept[name] = array
        safetensors.save(path, {name: array for name, array in kept.items() if array is not None})
    return change


@pytest.mark.parametrize(("change", "line"), [
    (config(ple_layer_ids=[]), r"ple_layer_ids = \[\]: must name the layers with a memory"),
    (config(eos_token_id=None), "eos_token_id = None: must be a token id"),
    (config(ngram_size=1), "ngram_size = 1: must be at least 2"),
    (config(ngram_size=10**12), "ngram_size = 10*: must be at least 2, and at most 64"),
    (config(rms_norm_eps="x"), "rms_norm_eps = 'x': must be a number"),
    (config(ple_embed_dim=63), "ple_embed_dim = 63: must be a multiple of the 8 heads"),
    (config(hidden_size="24"), "hidden_size = '24': must be a whole number"),
    (config(split_ngram_parts=128), "parts of .* = 5: split_ngram_parts is 128"),
    (config(ngram_vocab_size_base=503), "other parts = 1920: the primes sum to "),
    (config(ple_layer_ids=[3]), r"tensors of layer 2's n-gram table = \[\]: must be of one layer"),
    (tensors(shard_2__weight=None), "parts of .* = 4: part 2 is missing"),
    (tensors(shard_2__weight=np.zeros((384, 8), safetensors.DTYPES["BF16"])),
     "must hold rows as .*shard_0"),
    (tensors(shard_4__weight=np.zeros((256, 8), np.float32)), "other parts = 1792: the primes sum"),
    (tensors(shard_0__weight=np.zeros((384, 8), np.int32)), "dtype = 'I32': must be one of F8"),
    (tensors(shard_0__weight=np.zeros((384, 8), safetensors.DTYPES["F8_E4M3"])),
     "scales of .* = 0: must be one for fp8"),
    (tensors(value_proj__weight=np.zeros((24, 65), np.float32)), r"shape = .*must be \(24, 64\)"),
    (tensors(value_proj__weight=np.zeros((24, 64), np.int8)), "dtype = 'I8': must be one of F64"),
    (tensors(value_proj__weight=None), r"holds no tensor '.*ple.value_proj.weight'"),
    (lambda folder: (folder / "config.json").unlink(), "there is no such file"),
    (lambda folder: (folder / "config.json").write_text("[]"), "must be a JSON object"),
])
def test_what_cannot_be_imported_is_one_line(change, line, tmp_path):
    meta, _, weights = arrays(GOLDEN)
    folder = qwen_checkpoint(tmp_path / "theirs", meta, weights, parts=5)
    change(folder)
    with pytest.raises(UserError, match=line) as caught:
        open_qwen(folder)
    assert "\n" not in str(caught.value)
