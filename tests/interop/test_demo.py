"""State dicts of the public demo: golden weights in and out, and its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import CLOSE, arrays, golden_files

from engram_jax.config import EngramConfig
from engram_jax.errors import UserError
from engram_jax.interop.demo import from_demo, to_demo
from engram_jax.model.engram import fuse


def settings(meta):
    return EngramConfig(
        layers=(0,), rows_per_head=tuple(meta["rows"]), max_order=meta["max_ngram"],
        heads=meta["heads"], head_dim=meta["embed_per_order"] // meta["heads"],
        kernel=meta["kernel"], dilation=meta["dilation"], bias=meta["bias"],
        norm_eps=float(str(meta["qk_norm_eps"]).rpartition("=")[2]),
        conv_norm_eps=meta["conv_norm_eps"])


@pytest.mark.parametrize("path", golden_files("module_*.npz"))
def test_a_state_dict_comes_in_gives_its_output_and_goes_out_as_it_was(path):
    meta, golden, state = arrays(path)
    config, streams = settings(meta), meta["hc_mult"]
    params, table_RC = from_demo(state, config, streams)
    offsets_H = state["multi_head_embedding.offsets"]
    delta = jax.jit(lambda params, hidden, rows: fuse(params, hidden, rows, config).delta_BTMD)(
        jax.tree.map(jnp.asarray, params), golden["hidden"],
        table_RC[golden["row_ids"] + offsets_H])
    worst = np.abs(delta - golden["output"]).max() / np.abs(golden["output"]).max()
    assert worst < CLOSE
    again = to_demo(params, table_RC, offsets_H, config)
    assert again.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
        assert again[name].dtype == array.dtype


def test_what_does_not_fit_is_one_line():
    meta, _, state = arrays(golden_files("module_hc4.npz")[0].values[0])
    config = settings(meta)
    with pytest.raises(UserError, match=r"tensor 'key_projs.3.bias' = 'unknown'"):
        from_demo(state, config, 3)
    del state["value_proj.weight"]
    with pytest.raises(UserError, match=r"tensor 'value_proj.weight' = 'missing'"):
        from_demo(state, config, 4)
    plain = EngramConfig(layers=(0,), rows_per_head=(7, 7), signed_root=False)
    with pytest.raises(UserError, match=r"EngramConfig.signed_root = False: is True in the demo"):
        to_demo({}, np.zeros((1, 1)), np.zeros(1), plain)
