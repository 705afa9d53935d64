"""Experts alone, and the same parameters and FLOPs with a part of the experts as Engram's rows."""

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
from engram_jax.costs.allocation import allocate
from engram_jax.settings import changed
from experiments.long_context.language import LONG, SHORT, TOKENIZER, VOCABULARY, Texts

RHO = 0.6  # of the sparse parameters, what stays with experts
STEPS, EVERY = 600, 20  # of the training on short texts, and between its checkpoints
EXTENSION = 120  # steps of the extension
TOKENS = 2048  # of a step, in both


def bases(folder: str) -> dict[str, RunConfig]:
    """The arms before the extension."""
    experts = _experts(folder)
    memory = EngramConfig(layers=(1,), rows_per_head=(2, 2), heads=4, head_dim=8, table_std=0.0)
    return {"experts": experts,
            "engram": changed(allocate(experts, RHO, memory).run, {"name": "engram"})}


def _experts(folder: str) -> RunConfig:
    return RunConfig(
        name="experts",
        model=ModelConfig(
            vocab_size=len(VOCABULARY), width=64, depth=2, ffn=192, embedding_std=1.0,
            compute_dtype="float32", remat="none",
            attention=AttentionConfig(heads=4, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=16),
            moe=MoEConfig(experts=18, top_k=2, shared=1, expert_ffn=64, dense_layers=1)),
        data=_data(folder, SHORT),
        # row Adam was the default when the committed table was trained
        optimizer=OptimizerConfig(
            learning_rate=1.6e-2, warmup_steps=50, table_optimizer="row_adam"),
        training=TrainingConfig(steps=STEPS, evaluate_every=EVERY, checkpoint_every=EVERY,
                                keep_checkpoints=STEPS // EVERY, log_every=EVERY))


def _data(folder: str, texts: Texts) -> DataConfig:
    return DataConfig(
        path=f"{folder}/{texts.file}", tokenizer=f"{folder}/{TOKENIZER}",
        sequence_length=texts.length, batch_size=TOKENS // texts.length, validation_fraction=0.01)


def extension(folder: str) -> list[str]:
    """What an extension is told beside its length."""
    data = _data(folder, LONG)
    return [f"data.path={data.path}", f"data.batch_size={data.batch_size}",
            f"training.steps={EXTENSION}", "optimizer.warmup_steps=10",
            "optimizer.learning_rate=8e-3",
            "training.evaluate_every=0", "training.checkpoint_every=0"]
