"""A synthetic DeepSeek-V4.1 checkpoint: its names, dtypes and layouts, and a few hundred rows."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.interop.safetensors import Writer

LAYERS, ORDERS, HEADS, COLUMNS, WIDTH, STREAMS, IMAGE = (1, 3), 3, 2, 64, 64, 2, 11


def tokenizer():
    """Words that compression merges: with and without a capital and a space before them."""
    words = [f"{space}{word}" for word in ("the", "The", "of", "Of", "é", "e")
             for space in ("", "\u0120")]
    vocabulary = {word: number for number, word in enumerate(
        [*(f"<{i}>" for i in range(12)), *words])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return made


def hashing(rows=101):
    vocabulary = CompressedVocabulary.from_tokenizer(tokenizer())
    return NgramHash(rows_per_head=(rows,) * ORDERS, heads=HEADS, layers=LAYERS,
                     vocab_size=vocabulary.size, pad_id=int(vocabulary.lookup[2]))


def values(rows=101, nested=True):
    """The config in either spelling."""
    made, words = hashing(rows), tokenizer().get_vocab_size()
    text = {
        "engram_layer_ids": list(LAYERS), "engram_max_ngram_size": ORDERS + 1,
        "engram_num_embeddings": [made.table_rows[layer] for layer in LAYERS],
        "engram_vocab_size": rows, "engram_n_heads": HEADS, "engram_head_dim": COLUMNS,
        "engram_compressed_vocab_size": made.vocab_size, "hc_mult": STREAMS, "vocab_size": words}
    if nested:
        return {"image_token_id": IMAGE, "text_config": {
            **text, "engram_pad_token_id": 2, "hidden_size": WIDTH}}
    return {**text, "engram_pad_id": 2, "dim": WIDTH, "image_token_id": IMAGE}


def tensors(seed=0, rows=101):
    """Name to (dtype, bytes): every e4m3 and e8m0 byte comes up in the tables, NaN included."""
    random, made = np.random.default_rng(seed), hashing(rows)
    out = {}
    for layer in LAYERS:
        name, table_rows = f"layers.{layer}.engram.", made.table_rows[layer]
        width, retrieved = (STREAMS + 1) * WIDTH, ORDERS * HEADS * COLUMNS
        finite = random.integers(0, 127, (width, retrieved)) | (
            random.integers(0, 2, (width, retrieved)) << 7)
        out |= {
            f"{name}embed.weight": ("F8_E4M3", random.integers(0, 256, (table_rows, COLUMNS))),
            f"{name}embed.scale": ("F8_E8M0", random.integers(0, 256, (
                table_rows, COLUMNS // 32))),
            f"{name}wkv.weight": ("F8_E4M3", finite),
            f"{name}wkv.scale": ("F8_E8M0", random.integers(112, 118, (
                width // 32, retrieved // 32))),
            f"{name}q_weight": ("F32", random.standard_normal((STREAMS, WIDTH)) + 1),
            f"{name}k_weight": ("F32", random.standard_normal((STREAMS, WIDTH)) + 1)}
    return {name: (dtype, array.astype(np.float32 if dtype == "F32" else np.uint8))
            for name, (dtype, array) in out.items()}


def write(folder, chosen=None, config=None, shards=2):
    """Write a checkpoint in shards with an index; its folder."""
    chosen = tensors() if chosen is None else chosen
    folder.mkdir(exist_ok=True)
    names, index = list(chosen), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = names[number::shards]
        index.update(dict.fromkeys(own, file))
        with Writer(folder / file, {name: (chosen[name][0], chosen[name][1].shape)
                                    for name in own}) as writer:
            for name in own:
                writer.write(chosen[name][1])
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config or values()))
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    return folder
