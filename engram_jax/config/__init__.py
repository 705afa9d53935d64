"""What a run is: a tree of frozen dataclasses, validated when built.

A run is a value. Named runs are functions in `recipes.py`; variants are made with `changed` or,
from the command line, `--set field=value` (both in `settings.py`). Nothing here imports jax.
Every field has its meaning in the docstring of its class; docs/config.md is made of them.
"""

from engram_jax.config.checks import require, require_at_least
from engram_jax.config.model import (
    KEPT,
    KEYS,
    MAX_TABLE_ROWS,
    AttentionConfig,
    EngramConfig,
    HashConfig,
    ModelConfig,
    MoEConfig,
    OverEncodingConfig,
    YarnConfig,
)
from engram_jax.config.run import (
    TABLE_OPTIMIZERS,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)

ROW_DTYPES = ("float32", "bfloat16", "int8", "fp8")  # of tables off the device

__all__ = [
    "KEPT",
    "KEYS",
    "MAX_TABLE_ROWS",
    "ROW_DTYPES",
    "TABLE_OPTIMIZERS",
    "AttentionConfig",
    "DataConfig",
    "EngramConfig",
    "HashConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OverEncodingConfig",
    "RunConfig",
    "TrainingConfig",
    "YarnConfig",
    "require",
    "require_at_least",
]
