"""State dicts of DeepSeek's public demo module, both ways.

    multi_head_embedding.{offsets,embedding.weight}    the heads' tables end to end
    key_projs.M.{weight,bias}, value_proj.{weight,bias}
    norm1.M.weight of keys, norm2.M.weight of queries
    short_conv.{conv.weight,norms.M.weight}            channels are streams times width

Weights there are [out, in], here [in, out]; nothing is rounded either way.
Shapes: M streams, D width, R rows, C columns of a row.
"""

from collections.abc import Mapping

import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.interop.released import Weights


def from_demo(state: Mapping[str, np.ndarray], config: EngramConfig, streams: int
              ) -> tuple[Weights, np.ndarray]:
    """The fusion's weights, as `model.engram.init_engram` has them, and the table [R, C].

    Args:
      state: of one module, as NumPy arrays.
      config: settings of the module; `bias` and `kernel` say what the state has.
      streams: M.

    Raises:
      UserError: a tensor that is missing, or one that the settings do not have.
    """
    names = set(_names(config, streams))
    for name in sorted(names ^ set(state)):
        require(False, f"tensor {name!r}", "missing" if name in names else "unknown",
                "the state dict must have what the settings say")
    projections = [*(f"key_projs.{m}" for m in range(streams)), "value_proj"]

    def stacked(pattern: str) -> np.ndarray:
        return np.stack([state[pattern.format(m)] for m in range(streams)])

    params = {"project": np.stack([state[f"{name}.weight"].T for name in projections]),
              "key_gain": stacked("norm1.{}.weight"), "query_gain": stacked("norm2.{}.weight")}
    if config.bias:
        params["bias"] = np.stack([state[f"{name}.bias"] for name in projections])
    if config.kernel:
        taps_LC = state["short_conv.conv.weight"][:, 0].T
        params["conv"] = taps_LC.reshape(config.kernel, streams, -1)
        params["conv_gain"] = stacked("short_conv.norms.{}.weight")
    return params, state["multi_head_embedding.embedding.weight"]


def to_demo(params: Mapping[str, np.ndarray], table_RC: np.ndarray, offsets_H: np.ndarray,
            config: EngramConfig) -> dict[str, np.ndarray]:
    """The state dict of the demo's module, contiguous NumPy arrays.

    Args:
      params: of the fusion, with a gate for each stream.
      table_RC: all heads' rows end to end.
      offsets_H: int64, where each head's rows start (`NgramHash.offsets`).
      config: settings of the module.

    Raises:
      UserError: settings that the demo does not have.
    """
    for name, value, right in (("gated", config.gated, True),
                               ("per_branch", config.per_branch, True),
                               ("signed_root", config.signed_root, True)):
        require(value == right, f"EngramConfig.{name}", value, f"is {right} in the demo")
    project = np.asarray(params["project"])
    streams = len(project) - 1
    state = {"multi_head_embedding.offsets": np.asarray(offsets_H, np.int64),
             "multi_head_embedding.embedding.weight": np.asarray(table_RC)}
    for number, name in enumerate([*(f"key_projs.{m}" for m in range(streams)), "value_proj"]):
        state[f"{name}.weight"] = project[number].T
        if config.bias:
            state[f"{name}.bias"] = np.asarray(params["bias"])[number]
    for m in range(streams):
        state[f"norm1.{m}.weight"] = np.asarray(params["key_gain"])[m]
        state[f"norm2.{m}.weight"] = np.asarray(params["query_gain"])[m]
        if config.kernel:
            state[f"short_conv.norms.{m}.weight"] = np.asarray(params["conv_gain"])[m]
    if config.kernel:
        taps_LMD = np.asarray(params["conv"])
        state["short_conv.conv.weight"] = taps_LMD.reshape(config.kernel, -1).T[:, None]
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def _names(config: EngramConfig, streams: int) -> list[str]:
    """The tensors that a module of these settings has."""
    linear = [*(f"key_projs.{m}" for m in range(streams)), "value_proj"]
    ends = ("weight", "bias") if config.bias else ("weight",)
    names = ["multi_head_embedding.offsets", "multi_head_embedding.embedding.weight",
             *(f"{name}.{end}" for name in linear for end in ends),
             *(f"norm{n}.{m}.weight" for n in (1, 2) for m in range(streams))]
    if config.kernel:
        names += ["short_conv.conv.weight",
                  *(f"short_conv.norms.{m}.weight" for m in range(streams))]
    return names
