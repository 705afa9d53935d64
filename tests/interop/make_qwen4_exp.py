"""Run by a Python that has torch and transformers: a tiny random qwen4_exp and its layer's output.

    python make_qwen4_exp.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

folder = Path(sys.argv[1])
torch.manual_seed(0)
config = Qwen4ExpTextConfig(
    vocab_size=499, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    layer_types=["linear_attention", "linear_attention"], eos_token_id=[7, 9], seed=1234,
    hc_count=4, hc_lowrank=8, ple_layer_ids=[1, 2], ple_embed_dim=48, ngram_size=3,
    heads_per_ngram=3, ngram_vocab_size_base=97, split_ngram_parts=4)
model = Qwen4ExpForCausalLM(config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if ".ple." in name:
            parameter.copy_(torch.randn_like(parameter) * (0.5 if "norm" in name else 0.3))
model.save_pretrained(folder)

random = np.random.default_rng(1)
tokens = random.integers(0, 499, (3, 40))
tokens[:, 11::9] = 7
hidden = random.standard_normal((3, 40, 4 * 32)).astype(np.float32)
outputs = {}
for layer in (0, 1):
    ple = model.model.layers[layer].ple
    cache = DynamicCache(config=config)
    with torch.no_grad():
        whole = ple(torch.tensor(hidden), torch.tensor(tokens), None)
        steps = [ple(torch.tensor(hidden[:, t:t + 1]), torch.tensor(tokens[:, t:t + 1]), cache)
                 for t in range(40)]
    outputs[f"whole_{layer}"] = whole.numpy()
    outputs[f"steps_{layer}"] = torch.cat(steps, dim=1).numpy()
np.savez(folder / "outputs.npz", tokens=tokens, hidden=hidden, **outputs)
