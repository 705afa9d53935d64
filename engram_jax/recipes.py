"""The named runs: every model of the paper, and small ones for a laptop.

A recipe is a function that returns a `RunConfig`. Sizes are docs/spec.md section 3.1
(arXiv 2601.07372 table 5, arXiv 2512.24880 table 5). All train their tables by row-wise RMSProp:
the paper's dense Adam moves every row in every step, for which a large table has no time, and row
Adam, which moves only rows that were read, trains worse (experiments/row_optimizers). In how many
parts a step goes, and what is kept for its backward pass, the paper's models leave to the devices.
"""

import importlib
import re
from collections.abc import Callable

from etils import epath

from engram_jax.config import (
    AttentionConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    OverEncodingConfig,
    RunConfig,
    TrainingConfig,
)
from engram_jax.errors import UserError
from engram_jax.settings import changed, from_file
from engram_jax.storage import check_readable, read_json, refusals

PAPER_LAYERS = (1, 14)


def _paper(name: str, moe: MoEConfig | None, engram: EngramConfig | None) -> RunConfig:
    return RunConfig(
        name=name,
        model=ModelConfig(
            vocab_size=129_280, width=2560, depth=30, ffn=12_288, attention=AttentionConfig(),
            moe=moe, streams=4, engram=engram, remat="auto"),
        data=DataConfig(path="hf:HuggingFaceFW/fineweb-edu", tokenizer="deepseek-ai/DeepSeek-V3",
                        sequence_length=4096, batch_size=1280),
        optimizer=OptimizerConfig(),
        training=TrainingConfig(
            steps=50_000, accumulate=0, checkpoint_every=1000, evaluate_every=1000,
            evaluate_batches=4),  # 21M tokens; all of the text's 5 % would cost as much as training
    )


def _paper_engram(rows_per_head: int) -> EngramConfig:
    return EngramConfig(
        layers=PAPER_LAYERS, rows_per_head=(rows_per_head, rows_per_head), heads=8, head_dim=80,
        shards=1024)  # so many devices may divide a table


def dense_4b() -> RunConfig:
    """Dense: an FFN of 12288 in every block."""
    return _paper("dense-4b", None, None)


def moe_27b() -> RunConfig:
    """Pure mixture-of-experts: 72 routed experts, no memory."""
    return _paper("moe-27b", MoEConfig(experts=72), None)


def engram_27b() -> RunConfig:
    """moe-27b's parameters divided anew: 55 routed experts and 5.8B in memory."""
    run = _paper("engram-27b", MoEConfig(experts=55), _paper_engram(2_262_400))
    return changed(run, {"baseline": "moe-27b"})


def engram_40b() -> RunConfig:
    """engram-27b with 18.5B in memory."""
    return _paper("engram-40b", MoEConfig(experts=55), _paper_engram(7_239_680))


def _paper_small(name: str, width: int, depth: int, expert_ffn: int, ffn: int, experts: int,
                 tokens: float) -> RunConfig:
    """A model of the paper's experiments.

    The paper gives sizes and expert counts (docs/spec.md section 4) but no shapes: these are ours,
    and reconcile with its counts.
    """
    run = _paper(name, MoEConfig(experts=experts, expert_ffn=expert_ffn), None)
    step_tokens = run.data.sequence_length * run.data.batch_size
    return changed(run, {
        "model.width": width, "model.depth": depth, "model.ffn": ffn, "model.attention.heads": 16,
        "training.steps": round(tokens / step_tokens)})


def moe_6b() -> RunConfig:
    """The allocation experiment at 2e20 FLOPs: 5.7B parameters, 568M active, 106 experts."""
    return _paper_small("moe-6b", 1280, 12, 1216, 10_368, 106, 2e20 / (6 * 568e6))


def moe_10b() -> RunConfig:
    """The allocation experiment at 6e20 FLOPs: 9.9B parameters, 993M active, 99 experts."""
    return _paper_small("moe-10b", 1536, 16, 1384, 10_240, 99, 6e20 / (6 * 993e6))


def moe_3b() -> RunConfig:
    """Memory scaling and ablations: 3B parameters, 568M active; 100B tokens is our choice."""
    return _paper_small("moe-3b", 1280, 12, 1216, 10_624, 53, 100e9)


def engram_3b() -> RunConfig:
    """moe-3b with 1.6B in memory, before blocks 1 and 5: the ablations' reference."""
    return changed(moe_3b(), {"name": "engram-3b", "model.engram": _paper_engram(625_000),
                              "model.engram.layers": (1, 5)})


def tiny() -> RunConfig:
    """The demo's size: a mixture-of-experts with Engram that trains in a minute on two cores."""
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            vocab_size=4096, width=96, depth=3, ffn=256,
            attention=AttentionConfig(heads=2, kv_rank=32, nope_dim=32, rope_dim=16, value_dim=32),
            moe=MoEConfig(experts=8, top_k=2, shared=1, expert_ffn=64, dense_layers=1),
            streams=1, embedding_std=1.0, compute_dtype="float32", remat="none",
            engram=EngramConfig(
                layers=(1,), rows_per_head=(16_384, 16_384), heads=4, head_dim=16,
                table_std=0.0)),
        data=DataConfig(sequence_length=128, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
        training=TrainingConfig(steps=130, checkpoint_every=100),
    )


def small() -> RunConfig:
    """Every part switched on (four streams, two Engram layers), for a GPU or a patient CPU."""
    return RunConfig(
        name="small",
        model=ModelConfig(
            vocab_size=16_384, width=512, depth=8, ffn=1536,
            attention=AttentionConfig(heads=8, kv_rank=128, nope_dim=64, rope_dim=32,
                                      value_dim=64),
            moe=MoEConfig(experts=16, top_k=4, shared=1, expert_ffn=256),
            streams=4,
            engram=EngramConfig(
                layers=(1, 4), rows_per_head=(65_536, 65_536), heads=8, head_dim=32)),
        data=DataConfig(tokenizer="bpe:16384", sequence_length=512, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200),
        training=TrainingConfig(steps=5000, checkpoint_every=500, evaluate_every=500,
                                evaluate_batches=16),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "small": small,
    "moe-3b": moe_3b,
    "engram-3b": engram_3b,
    "moe-6b": moe_6b,
    "moe-10b": moe_10b,
    "dense-4b": dense_4b,
    "moe-27b": moe_27b,
    "engram-27b": engram_27b,
    "engram-40b": engram_40b,
}


def recipe(name: str) -> RunConfig:
    """The named run.

    Raises:
      UserError: no recipe has that name.
    """
    if name not in RECIPES:
        raise UserError(f"recipe = {name!r}: no such recipe; there are {', '.join(RECIPES)}")
    return RECIPES[name]()


def chosen_run(name: str) -> RunConfig:
    """The run that a user named.

    Args:
      name: a recipe's name; "MODULE:FUNCTION", a function of the user's own that takes nothing and
        returns a `RunConfig`; or a path to a config.json or to the folder that holds it.

    Raises:
      UserError: it names none of these.
    """
    if name in RECIPES:
        return recipe(name)
    if re.fullmatch(r"[\w.]+:\w+", name):
        return _made_by(name)
    check_readable(name, "recipe")
    path = epath.Path(name).expanduser()
    with refusals(path, "read"):
        if path.is_dir():
            path /= "config.json"
        if path.exists():
            return read_config(path)
    raise UserError(f"recipe = {name!r}: no such recipe, and no such file; there are "
                    f"{', '.join(RECIPES)}, or name a config.json, a run's folder or a "
                    "MODULE:FUNCTION of your own")


def read_config(path: epath.Path) -> RunConfig:
    """The run that a config.json holds.

    Raises:
      UserError: it holds none.
    """
    config: RunConfig = from_file(path, read_json(path))
    return config


def _made_by(name: str) -> RunConfig:
    """What the function "MODULE:FUNCTION" returns."""
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise UserError(f"recipe = {name!r}: there is no module {error.name!r} here") from error
    except AttributeError as error:
        raise UserError(f"recipe = {name!r}: {module} has no {function}") from error
    run = make() if callable(make) else make
    if not isinstance(run, RunConfig):
        raise UserError(f"recipe = {name!r}: must return a RunConfig, and returns a "
                        f"{type(run).__name__}")
    return run


def without_memory(run: RunConfig) -> RunConfig:
    """The same backbone with no memory."""
    return changed(run, {"model.engram": None, "model.over_encoding": None})


def with_over_encoding(run: RunConfig) -> RunConfig:
    """The same backbone with OverEncoding of the same hash in the place of Engram.

    OverEncoding divides the token embedding by 1 + (N - 1) K; it starts that much larger, so that
    the first block sees the scale that it sees in the other models.

    Raises:
      UserError: the run has no Engram to replace.
    """
    engram = run.model.engram
    if engram is None:
        raise UserError("model.engram = None: there is no memory to replace by OverEncoding")
    over = OverEncodingConfig(
        rows_per_head=engram.rows_per_head, max_order=engram.max_order, heads=engram.heads,
        compress=engram.compress, hash_seed=engram.hash_seed, shards=engram.shards,
        table_std=engram.table_std)
    return changed(run, {
        "model.engram": None, "model.over_encoding": over,
        "model.embedding_std": run.model.embedding_std * (1 + over.total_heads)})
