"""A run so small that a step takes milliseconds, and a made-up text for it."""

import random

import jax

from engram_jax.config import (
    AttentionConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import changed

SYLLABLES = ("ka", "lo", "mi", "su", "te", "ra", "no", "vi", "pe", "du")


STEPS = 7  # of every run: the number is in the compiled step, by way of the schedule


def keep_compilations(folder):
    """Compile each program quickly and once for all tests; returns what undoes it."""
    settings = {"jax_disable_most_optimizations": True,
                "jax_compilation_cache_dir": str(folder),
                "jax_persistent_cache_min_compile_time_secs": 0.0,
                "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    return lambda: [jax.config.update(name, value) for name, value in before.items()]


def write_text(path, words=4000, seed=0):
    """A text of made-up words, a line each sentence; the file's name."""
    chosen = random.Random(seed)
    text = [chosen.choice(SYLLABLES) + chosen.choice(SYLLABLES) for _ in range(words)]
    path.write_text("\n".join(" ".join(text[i:i + 8]) for i in range(0, words, 8)) + "\n")
    return str(path)


def micro(path, name="micro", **training):
    """One segment with every part in it: Engram, experts, four residual streams."""
    return RunConfig(
        name=name,
        model=ModelConfig(
            vocab_size=300, width=32, depth=2, ffn=48, streams=4, sinkhorn_rounds=4,
            compute_dtype="float32", remat="none",
            attention=AttentionConfig(heads=2, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8),
            moe=MoEConfig(experts=4, top_k=2, shared=1, expert_ffn=16, dense_layers=0),
            engram=EngramConfig(
                layers=(0,), rows_per_head=(64, 128), heads=2, head_dim=8, shards=4)),
        data=DataConfig(path=path, tokenizer="bpe:300", sequence_length=16, batch_size=4,
                        validation_fraction=0.05, cache_dir=f"{path}.cache"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainingConfig(**{
            "steps": STEPS, "checkpoint_every": 3, "log_every": 1, **training}),
    )


def plain(run):
    """The run with dense FFNs and one residual stream, to be compiled in little time."""
    return with_model(run, moe=None, streams=1, depth=1)


def with_model(run, **fields):
    """The run with fields of its model changed."""
    return changed(run, {f"model.{name}": value for name, value in fields.items()})


def with_data(run, **fields):
    return changed(run, {f"data.{name}": value for name, value in fields.items()})


def with_training(run, **fields):
    return changed(run, {f"training.{name}": value for name, value in fields.items()})


def with_optimizer(run, **fields):
    return changed(run, {f"optimizer.{name}": value for name, value in fields.items()})


def curve(directory):
    """What a run logged, without what depends on the machine's speed."""
    return [{name: value for name, value in row.items() if not name.startswith("perf/")}
            for row in RunDirectory(directory).metrics()]


def outcome(directory):
    """What a run ended with, without its speed."""
    return {name: value for name, value in RunDirectory(directory).result().items()
            if name != "tokens_per_s"}
