"""Small texts for tests, packed and read back."""

import dataclasses
import os
import random

import hypothesis
import numpy as np

from engram_jax.data import sources

# Of tests that make up their inputs: the same 80 each time, or others, as many as ENGRAM_FUZZ says.
fuzzed = hypothesis.settings(
    max_examples=int(os.environ.get("ENGRAM_FUZZ", "80")), deadline=None, database=None,
    derandomize="ENGRAM_FUZZ" not in os.environ)
WORDS = [a + b for a in ("ka", "lo", "mi", "su", "té") for b in ("ra", "no", "vi", "pe", "")]


def prose(seed, words):
    """Lines of made-up words."""
    chosen = random.Random(seed).choices(WORDS, k=words)
    return "\n".join(" ".join(chosen[i:i + 9]) for i in range(0, words, 9)) + "\n"


def write_documents(folder, texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def changed(config, **values):
    return dataclasses.replace(config, **values)


def documents(config, path, **values):
    return list(sources.open_source(changed(config, path=str(path), **values)).documents())


def read_all(stream):
    return stream.read(0, len(stream))


def decoded(data, stream):
    """The stream's text, end tokens as newlines of their own."""
    parts = np.split(ids := read_all(stream), np.flatnonzero(ids == data.end_id) + 1)
    return [data.tokenizer.decode(part.tolist()) for part in parts]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
            assert batch[name].dtype == other[name].dtype
