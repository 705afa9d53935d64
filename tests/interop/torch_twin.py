"""Run by a Python that has torch and safetensors: an exported run's logits, with nothing of ours.

    python torch_twin.py EXPORT TOKENS.npy LOGITS.npy

It reads the export's files only, and does a model's arithmetic in float64: embedding, n-gram memory
with gate and convolution, latent attention, gated FFN, head; one residual stream, dense FFNs.
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

folder, tokens_path, out = map(Path, sys.argv[1:])
config = json.loads((folder / "config.json").read_text())["config"]["model"]
named = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
files = {name: load_file(folder / name) for name in set(named.values())}
tensors = {name: files[file][name].double() for name, file in named.items()}
memory, = json.loads((folder / "hash.json").read_text())["memories"]
tokens = torch.tensor(np.load(tokens_path), dtype=torch.int64)
settings, eps = config["attention"], config["norm_eps"]
assert config["streams"] == 1
assert config["moe"] is None


def rms(x, gain, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def table(site):
    parts = []
    while (name := f"tables.{site}.part_{len(parts)}") in tensors:
        parts.append(tensors[name])
    return torch.cat(parts)


def row_ids(tokens, layer):
    """Multiply, xor, modulus in int64: products stay below 2**63."""
    lookup = torch.tensor(np.frombuffer(base64.b64decode(memory["token_map"]["base64"]), "<i4")
                          .astype(np.int64))
    at = memory["layers"].index(layer)
    multipliers, primes = memory["multipliers"][at], memory["primes"][at]
    canonical, ids, start, mix = lookup[tokens], [], 0, 0
    for back, multiplier in enumerate(multipliers):
        shifted = torch.nn.functional.pad(canonical, (back, 0), value=memory["pad_id"])
        mix = mix ^ (shifted[:, :tokens.shape[1]] * multiplier)
        for prime in primes[back - 1] if back else ():
            ids.append(mix % prime + start)
            start += prime
    return torch.stack(ids, dim=-1)


def engram(x, rows, params, settings):
    flat = rows.flatten(-2)
    key, value = (flat @ params["project"][which] for which in (0, 1))
    score = (rms(x, params["query_gain"][0], settings["norm_eps"])
             * rms(key, params["key_gain"][0], settings["norm_eps"])).sum(-1) * x.shape[-1]**-0.5
    score = score.sign() * score.abs().clamp_min(1e-6).sqrt()
    gated = torch.sigmoid(score)[..., None] * value
    normed = rms(gated, params["conv_gain"][0], settings["conv_norm_eps"])
    taps = params["conv"][:, 0].T[:, None]  # [D, 1, L]
    dilation = settings["dilation"] or settings["max_order"]
    padded = torch.nn.functional.pad(normed.mT, ((taps.shape[-1] - 1) * dilation, 0))
    mixed = torch.nn.functional.conv1d(padded, taps, dilation=dilation, groups=len(taps)).mT
    return torch.nn.functional.silu(mixed) + gated


def rope(x):
    """Halves as pairs, [..., T, H, R]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * (
        settings["rope_theta"] ** (-torch.arange(half).double() / half))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x, params):
    batch, time, _ = x.shape
    heads, n, r, v = (settings[name] for name in ("heads", "nope_dim", "rope_dim", "value_dim"))
    query = (x @ params["query"]).reshape(batch, time, heads, n + r)
    query = torch.cat([query[..., :n], rope(query[..., n:])], dim=-1)
    latent, shared = (x @ params["latent"]).split([settings["kv_rank"], r], dim=-1)
    expanded = (rms(latent, params["latent_gain"], eps) @ params["expand"]).reshape(
        batch, time, heads, n + v)
    shared = rope(shared[:, :, None]).expand(batch, time, heads, r)
    key = torch.cat([expanded[..., :n], shared], dim=-1)
    scores = torch.einsum("bthx,bshx->bhts", query, key) * (n + r)**-0.5
    scores = scores.masked_fill(~torch.ones(time, time).tril().bool(), -torch.inf)
    mixed = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), expanded[..., n:])
    return mixed.reshape(batch, time, heads * v) @ params["output"]


def below(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


x = tensors["params.embedding"][tokens]
block = 0
while segment := below(f"params.segments.{block}."):
    blocks = {name.removeprefix("blocks."): tensor for name, tensor in segment.items()
              if name.startswith("blocks.")}
    assert len(blocks["attention_gain"]) == 1, "one block a segment"
    if "engram.project" in segment:
        rows = table(f"layer_{block}")[row_ids(tokens, block)]
        x = x + engram(x, rows, below(f"params.segments.{block}.engram."), config["engram"])
    one = {name: tensor[0] for name, tensor in blocks.items()}
    x = x + attention(rms(x, one["attention_gain"], eps), {
        name.removeprefix("attention."): tensor for name, tensor in one.items()})
    normed = rms(x, one["ffn_gain"], eps)
    hidden = torch.nn.functional.silu(normed @ one["ffn.gate"]) * (normed @ one["ffn.up"])
    x = x + hidden @ one["ffn.down"]
    block += 1
np.save(out, (rms(x, tensors["params.final_gain"], eps) @ tensors["params.head"]).numpy())
