"""What a run is: a model, its text, its optimizer and how long it trains."""

import dataclasses
import math

from engram_jax.config.checks import require, require_at_least
from engram_jax.config.model import ModelConfig

FROZEN = ("", "tables", "backbone")
MAX_SEED = MAX_STEPS = 2**31 - 1  # int32
SCHEDULES = ("step", "wsd")
TABLE_OPTIMIZERS = ("row_adam", "dense_adam", "row_rmsprop", "row_adagrad", "balanced_momentum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text to batches.

    Attributes:
      path: "stdlib" (the source of Python's standard library), a text file, a folder of text
        files, a .jsonl, .ndjson, .json or .parquet file, "hf:NAME" (Hugging Face datasets) or a
        folder of token shards.
      mixture: several such sources in the place of `path`, each "PATH=WEIGHT": its share of the
        bytes is its weight over the sum of all.
      revision: the commit, tag or branch of the Hugging Face hub at which "hf:NAME" is read; "" is
        the newest.
      text_field: the field that holds the text, for records and Hugging Face datasets.
      tokenizer: "bpe:SIZE" trains a byte-level BPE of that size on the text; else a
        tokenizer.json, a folder that holds one, or a hub name.
      sequence_length: tokens that a sequence predicts (T).
      batch_size: sequences in a step, over all devices (B).
      validation_fraction: share of the text kept for validation.
      seed: order of the training sequences.
      cache_dir: where token shards and trained tokenizers are kept; "" is
        $ENGRAM_CACHE, or else engram_jax in the user's cache folder.
    """

    path: str = "stdlib"
    mixture: tuple[str, ...] = ()
    revision: str = ""
    text_field: str = "text"
    tokenizer: str = "bpe:4096"
    sequence_length: int = 256
    batch_size: int = 8
    validation_fraction: float = 0.05
    seed: int = 0
    cache_dir: str = ""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", self.path, "must name a source of text")
        require(not self.revision or any(path.startswith("hf:") for path in self.sources),
                "data.revision", self.revision, "is of a data set hf:NAME; no source is one")
        require_at_least(self, 1, "data", "sequence_length", "batch_size")
        require_at_least(self, 0, "data", "seed")
        require(0 < self.validation_fraction < 1, "data.validation_fraction",
                self.validation_fraction, "must be between 0 and 1")

    @property
    def sources(self) -> tuple[str, ...]:
        """The paths of `mixture`, or `path`."""
        return tuple(entry.rpartition("=")[0] for entry in self.mixture) or (self.path,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon for matrices, Adam for the rest, an optimizer of rows for tables.

    Rules and rates are those of docs/spec.md section 3.3. The learning rate warms up linearly and
    never rises once its decay has begun, however long the warm-up is.

    Attributes:
      learning_rate: the highest rate of the backbone.
      schedule: "step" is the paper's, a lower rate from given shares of the run on; "wsd" keeps the
        rate until the last `decay_share` of the steps, in which it falls on a line.
      warmup_steps: steps in which the rate rises; the rise ends where the decay begins.
      decay_at: of "step": ascending shares of the run from which on a factor holds.
      decay_to: of "step": these factors of `learning_rate`, none above the one before.
      decay_share: of "wsd": the share of the run, at its end, in which the rate falls.
      decay_floor: of "wsd": the factor that the last step has.
      weight_decay: decoupled, of matrices and embeddings, in shares of the learning rate.
      muon_momentum: momentum of the backbone's matrices.
      muon_rms: root mean square of an update's entries, before the learning rate.
      adam_b1: Adam's decay of the mean gradient, for embeddings, head and vectors.
      adam_b2: Adam's decay of the mean squared gradient, for these.
      adam_eps: Adam's epsilon, for these.
      clip_norm: the largest norm of a whole gradient, the tables' included; longer ones are scaled.
      table_optimizer: of the tables: "row_rmsprop" and "row_adagrad" move only rows that were read
        and keep one number a row; "row_adam" does, too, and catches up with their moments;
        "dense_adam", the paper's, and "balanced_momentum" move the whole table. The default was
        the best of the five (experiments/row_optimizers) and costs a row of any width 8 bytes.
      table_multiplier: learning rate of the tables over that of the backbone.
      table_b1: decay of the mean gradient, for tables with Adam.
      table_b2: decay of the mean squared gradient, for tables with Adam or RMSProp.
      table_eps: epsilon, for tables with Adam, RMSProp or Adagrad.
      table_momentum: momentum, for tables with balanced momentum.
    """

    learning_rate: float = 4e-4
    schedule: str = "step"
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.8, 0.9)
    decay_to: tuple[float, ...] = (0.316, 0.1)
    decay_share: float = 0.1
    decay_floor: float = 0.0
    weight_decay: float = 0.1
    muon_momentum: float = 0.95
    muon_rms: float = 0.18
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    clip_norm: float = 1.0
    table_optimizer: str = "row_rmsprop"
    table_multiplier: float = 5.0
    table_b1: float = 0.9
    table_b2: float = 0.95
    table_eps: float = 1e-8
    table_momentum: float = 0.95

    def __post_init__(self) -> None:
        require_at_least(self, 0, "optimizer", "warmup_steps", "weight_decay", "muon_rms",
                         "adam_eps", "table_multiplier", "table_eps")
        for field in ("learning_rate", "clip_norm"):
            value = getattr(self, field)
            require(0 < value < math.inf, f"optimizer.{field}", value, "must be positive")
        for field in ("muon_momentum", "adam_b1", "adam_b2", "table_b1", "table_b2",
                      "table_momentum"):
            value = getattr(self, field)
            require(0 <= value < 1, f"optimizer.{field}", value, "must be in [0, 1)")
        require(self.schedule in SCHEDULES, "optimizer.schedule", self.schedule,
                f"must be one of {', '.join(SCHEDULES)}")
        self._check_decay()

    def _check_decay(self) -> None:
        require(len(self.decay_at) == len(self.decay_to), "optimizer.decay_at", self.decay_at,
                f"must have as many entries as optimizer.decay_to ({len(self.decay_to)})")
        require(all(0 < share <= 1 for share in self.decay_at)
                and list(self.decay_at) == sorted(set(self.decay_at)), "optimizer.decay_at",
                self.decay_at, "must be ascending shares of the run, in (0, 1]")
        require(all(0 <= factor <= 1 for factor in self.decay_to)
                and list(self.decay_to) == sorted(self.decay_to, reverse=True),
                "optimizer.decay_to", self.decay_to,
                "must be factors in [0, 1], none above the one before")
        require(0 < self.decay_share <= 1, "optimizer.decay_share", self.decay_share,
                "must be a share of the run, in (0, 1]")
        require(0 <= self.decay_floor <= 1, "optimizer.decay_floor", self.decay_floor,
                "must be in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train and what to leave behind.

    Attributes:
      steps: updates from the start to the end.
      seed: of the parameters and tables at the start.
      evaluate_every: steps from one evaluation to the next; 0 evaluates only at the end.
      checkpoint_every: steps from one checkpoint to the next; 0 saves only at the end.
      log_every: steps from one row of metrics.jsonl to the next; 0 writes one only at the end.
      evaluate_batches: validation batches that an evaluation reads; 0 reads all.
      keep_checkpoints: how many of the latest checkpoints are kept.
      tensorboard: also write TensorBoard events (extra `tensorboard`).
      grace_seconds: from SIGTERM or Ctrl-C to the end of the process; by then the step under way
        and its checkpoint should be done.
      start_from: RUN or RUN@STEP, the folder of a run whose checkpoint (the last one unless a step
        is named) this one begins from, with its weights and tables; "" begins anew.
      start_optimizer: of `start_from`: take over the optimizer's state and the step, too, and the
        place in the data if it is the same; so a run is extended.
      freeze: what stays as it was at the start: "tables", "backbone" (every parameter outside the
        memories), or "" for nothing.
      skips_in_a_row: a step whose loss or gradient is not finite is skipped; when more than so many
        follow one another the run has diverged, and stops.
      accumulate: a step's batch is cut into so many parts, one after another; the gradients add up,
        and activations take so much less memory. Rows of tables and their gradients are those of
        the whole batch, as a row meets its optimizer once a step; matrices that are split over
        devices travel for every part, forward and back. 0 is the fewest parts that fit the devices
        by a guess (`training.fitting`).
      row_capacity: rows that a device may ask of each peer in one round of the exchange, as a share
        of (ids it looks up / devices); more rounds follow where it is short. 0 measures the data.
      check_exchange: in every step the devices check that rows reach their owners and that tables
        have gradients; a step that fails changes nothing, and the run stops.
    """

    steps: int
    seed: int = 0
    accumulate: int = 1
    row_capacity: float = 0.0
    evaluate_every: int = 0
    evaluate_batches: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    tensorboard: bool = False
    skips_in_a_row: int = 3
    grace_seconds: float = 30.0
    start_from: str = ""
    start_optimizer: bool = False
    freeze: str = ""
    check_exchange: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 1, "training", "steps", "keep_checkpoints")
        require_at_least(self, 0, "training", "seed", "accumulate", "evaluate_every",
                         "evaluate_batches", "checkpoint_every", "log_every", "row_capacity",
                         "skips_in_a_row", "grace_seconds")
        require(self.freeze in FROZEN, "training.freeze", self.freeze,
                'must be "tables", "backbone" or "" for nothing')
        require(not self.start_optimizer or bool(self.start_from), "training.start_optimizer",
                self.start_optimizer, "needs training.start_from")
        for field, most in (("seed", MAX_SEED), ("steps", MAX_STEPS)):
            value = getattr(self, field)
            require(value <= most, f"training.{field}", value, f"must be at most {most}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole.

    Attributes:
      name: stands in its records and in the tables and figures that are made of them.
      model: the network and its memory.
      data: its text.
      optimizer: how it learns.
      training: how long, and what it leaves behind.
      baseline: the recipe whose sparse parameters this model divides anew between experts and
        memory; the allocation ratio rho is measured against its budget.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    baseline: str = ""

    def __post_init__(self) -> None:
        memory = self.model.engram or self.model.over_encoding
        require(not self.training.freeze or memory is not None, "training.freeze",
                self.training.freeze, "the model has no memory: its tables are not there, and the "
                "rest is all of it")
