"""Reference numbers of the released Qwen n-gram layer: golden/qwen_ngram_*.npz."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import arrays, golden_files, qwen_hash


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
