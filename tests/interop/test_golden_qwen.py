"""Reference numbers of the released Qwen n-gram layer: golden/qwen_ngram_*.npz."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import CLOSE, arrays, golden_files, qwen_checkpoint, qwen_hash

from engram_jax.interop.layers import layer_of
from engram_jax.interop.qwen import open_qwen
from engram_jax.interop.released import open_released, write_released

pytestmark = pytest.mark.usefixtures("compilations")


@pytest.mark.parametrize("path", golden_files("qwen_ngram_*.npz"))
def test_row_ids(path):
    assert not jax.config.jax_enable_x64
    meta, golden, _ = arrays(path)
    memory, layer = qwen_hash(meta)
    assert [str(m) for m in memory.hashing.multipliers[layer]] == meta["multipliers"]
    assert [p for heads in memory.hashing.primes[layer] for p in heads] == meta["primes"]
    assert memory.hashing.offsets[layer].tolist() == meta["offsets"]
    tokens_BT = golden["tokens"].astype(np.int32)
    np.testing.assert_array_equal(memory.table_ids_numpy(tokens_BT, layer), golden["row_ids"])
    np.testing.assert_array_equal(
        jax.jit(lambda tokens: memory.table_ids(tokens, layer))(jnp.asarray(tokens_BT)),
        golden["row_ids"])


def outputs(released, layer, golden, chunk):
    """What the layer adds, jitted, `chunk` tokens at a time with history and convolution state."""
    module, variables = layer_of(released, layer)
    apply = jax.jit(module.apply)
    tokens_BT, width = golden["tokens"].astype(np.int32), released.width
    hidden_BTMD = golden["hidden"].reshape(*tokens_BT.shape, released.streams, width)
    state, out = None, []
    for start in range(0, tokens_BT.shape[1], chunk):
        part = jnp.asarray(hidden_BTMD[:, start:start + chunk])
        after, state = apply(variables, part, tokens_BT[:, start:start + chunk], state)
        out.append(after - part)
    return np.concatenate(out, axis=1).reshape(golden["output"].shape)


@pytest.mark.parametrize("path", golden_files("qwen_ngram_*.npz"))
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("parts", [0, 10])
def test_output_whole_and_token_by_token(path, chunk, parts, tmp_path):
    """One weight or parts, through a checkpoint's files and our own folder of it."""
    meta, golden, weights = arrays(path)
    layer = sorted(meta["ple_layer_ids"])[meta["layer_index"]] - 1
    released = open_qwen(qwen_checkpoint(tmp_path / "theirs", meta, weights, parts=parts))
    write_released(released, tmp_path / "ours")
    largest = np.abs(golden["output"]).max()
    for opened in (released, open_released(tmp_path / "ours", "disk"),
                   open_released(tmp_path / "ours", "host")):
        np.testing.assert_allclose(outputs(opened, layer, golden, chunk), golden["output"],
                                   rtol=0, atol=CLOSE * largest)
        opened.close()
