"""What a model is: the memory, the backbone's parts, and the whole."""

import dataclasses
import math

from engram_jax.config.checks import require, require_all_whole, require_at_least, require_whole

MAX_TABLE_ROWS = 2**31 - 1  # row ids are int32
KEYS = ("ngrams", "shuffled", "random")
KEPT = ("none", "outputs", "ffn", "block")  # for the backward pass, from all to least
ATTENTIONS = ("auto", "xla", "splash", "cudnn")
STREAM_LAYOUTS = ("auto", "joined", "apart")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashConfig:
    """How tokens become row ids; shared by every memory that is addressed by n-grams.

    Attributes:
      rows_per_head: rows of each head's table, one entry for each order 2..N. Each head gets the
        next unused prime that is not below it (docs/spec.md section 1.2).
      max_order: N, the longest n-gram; `rows_per_head` has an entry for each order up to it.
      heads: heads for each order.
      compress: hash canonical ids (the compressed vocabulary) instead of raw token ids.
      hash_seed: seed of the multipliers.
      shards: virtual shards of a table `[shards, rows, dim]`; its bytes do not depend on the mesh.
      table_std: standard deviation of a table's entries at the start (not published).
      table_dtype: "float32", or "bfloat16", kept as uint16 bits and rounded stochastically.
      keys: what points at rows. "ngrams" is the memory; the others are controls that only train
        and evaluate: "shuffled" gives each sequence the n-grams of its neighbour in the batch,
        "random" gives each position rows by chance.
    """

    rows_per_head: tuple[int, ...]
    max_order: int = 3
    heads: int = 8
    compress: bool = True
    hash_seed: int = 0
    shards: int = 64
    table_std: float = 0.02
    table_dtype: str = "float32"
    keys: str = "ngrams"

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_all_whole(self, name, "rows_per_head")
        require_whole(self, name, "max_order", "heads", "hash_seed", "shards")
        require(self.keys in KEYS, f"{name}.keys", self.keys, f"must be one of {', '.join(KEYS)}")
        rows = self.rows_per_head
        require(self.max_order >= 2, f"{name}.max_order", self.max_order, "must be at least 2")
        require(len(rows) == self.max_order - 1, f"{name}.rows_per_head", rows,
                f"needs {self.max_order - 1} entries, one for each n-gram order "
                f"2..{self.max_order} ({name}.max_order = {self.max_order})")
        require(min(rows) >= 2, f"{name}.rows_per_head", rows, "must be at least 2 each")
        require(self.heads >= 1, f"{name}.heads", self.heads, "must be at least 1")
        require(sum(rows) * self.heads < MAX_TABLE_ROWS, f"{name}.rows_per_head", rows,
                f"times {self.heads} heads makes a table of over 2**31 - 1 rows")
        require_at_least(self, 0, name, "hash_seed", "table_std")
        require(1 <= self.shards <= 65536, f"{name}.shards", self.shards, "must be in 1..65536")
        require(self.table_dtype in ("float32", "bfloat16"), f"{name}.table_dtype",
                self.table_dtype, "must be float32 or bfloat16")

    @property
    def total_heads(self) -> int:
        """Rows read for each token: (N - 1) * K."""
        return len(self.rows_per_head) * self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngramConfig(HashConfig):
    """The Engram module (docs/spec.md section 1).

    Attributes:
      layers: 0-based blocks before whose attention the module stands. In a network of your own a
        block's number only seeds its hash, so a single module may keep the default, the paper's
        first.
      head_dim: columns of a row.
      kernel: taps of the causal depthwise convolution; 0 leaves the convolution out (V4.1).
      dilation: dilation of the convolution; 0 means N, the longest n-gram.
      gated: the gate of eq. 4; without it everything that was retrieved is used.
      per_branch: keys, gate and convolution for each residual stream; without it one of each reads
        the mean of the streams, and all streams get the same.
      one_table: all layers read the same rows of one table, the first layer's.
      signed_root: s <- sign(s) sqrt(max(|s|, 1e-6)) before the sigmoid (demo, V4.1); the paper's
        text has the plain sigmoid.
      bias: biases in W_K and W_V (demo only).
      norm_eps: epsilon of the two norms inside the gate.
      conv_norm_eps: epsilon of the norm before the convolution.
      vocab_size: raw ids are below it. Used by the drop-in module; inside a run the tokenizer
        decides.
      pad_id: the raw id that positions before the start count as. Used as `vocab_size` is.
    """

    layers: tuple[int, ...] = (1,)
    head_dim: int = 80
    kernel: int = 4
    dilation: int = 0
    gated: bool = True
    per_branch: bool = True
    one_table: bool = False
    signed_root: bool = True
    bias: bool = False
    norm_eps: float = 1e-6
    conv_norm_eps: float = 1e-5
    vocab_size: int = 129_280
    pad_id: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_all_whole(self, "EngramConfig", "layers")
        require_whole(self, "EngramConfig", "head_dim", "kernel", "dilation", "vocab_size",
                      "pad_id")
        require(len(self.layers) >= 1, "EngramConfig.layers", self.layers,
                "names no block, so the memory would not be used; set model.engram to none instead")
        require(list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
                "EngramConfig.layers", self.layers, "must be ascending block numbers, 0-based")
        require_at_least(self, 1, "EngramConfig", "head_dim", "vocab_size")
        require_at_least(self, 0, "EngramConfig", "kernel", "dilation", "norm_eps",
                         "conv_norm_eps", "pad_id")

    @property
    def memory_dim(self) -> int:
        """d_mem = (N - 1) * K * head_dim, the width of what one token retrieves."""
        return self.total_heads * self.head_dim

    @property
    def conv_dilation(self) -> int:
        return self.dilation or self.max_order

    @property
    def conv_reach(self) -> int:
        """How many positions back the convolution looks."""
        return max(0, self.kernel - 1) * self.conv_dilation

    def branches(self, streams: int) -> int:
        """Gates of a module before `streams` residual streams."""
        return streams if self.per_branch else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverEncodingConfig(HashConfig):
    """OverEncoding (arXiv 2501.16975): n-gram tables averaged into the input embedding.

    A head's rows are width / ((N - 1) * K) wide.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Rotary positions beyond the length that a model was trained at (YaRN, arXiv 2309.00071).

    Frequencies whose wavelengths fit `beta_fast` times and more into the original length stay,
    those that fit `beta_slow` times and less are divided by the factor, and those between are
    blended; scores are multiplied by (0.1 mscale ln factor + 1) ** 2, as in DeepSeek-V2.

    Attributes:
      factor: how many times the original length the model is to read.
      original_length: tokens of a sequence in the training before the extension.
      beta_fast: so many wavelengths and more in the original length, and a frequency stays (the
        paper's beta).
      beta_slow: so many and fewer, and a frequency is divided by the factor (the paper's alpha).
      mscale: of the scores' temperature; 0 leaves them as they are.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.707

    def __post_init__(self) -> None:
        require_at_least(self, 1, "YarnConfig", "factor", "original_length")
        require_at_least(self, 0, "YarnConfig", "mscale")
        require(math.isfinite(self.beta_fast) and 0 < self.beta_slow < self.beta_fast,
                "YarnConfig.beta_slow", self.beta_slow,
                f"must be between 0 and beta_fast = {self.beta_fast}")

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by, beside 1 / sqrt(the width of a head)."""
        return (0.1 * self.mscale * math.log(self.factor) + 1) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head latent attention without query compression (DeepSeek-V2).

    Attributes:
      heads: query heads, which share one latent.
      kv_rank: width of the latent that a cache keeps of each position.
      nope_dim: width of a head's part that knows nothing of positions.
      rope_dim: width of a head's part with rotary positions.
      value_dim: width of a head's value.
      rope_theta: base of the rotary frequencies, theta ** (-2i / rope_dim).
      yarn: the extension of the context; none is the frequencies as they are.
      implementation: what computes whole sequences, in training and evaluation: "xla" anywhere,
        "splash" on TPUs, "cudnn" on NVIDIA's GPUs in bfloat16, with which no training step has
        run yet (docs/design.md); "auto" is "splash" on TPUs, else "xla". None of them keeps scores
        of a long sequence against itself.
    """

    heads: int = 32
    kv_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    rope_theta: float = 10_000.0
    yarn: YarnConfig | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        require(self.implementation in ATTENTIONS, "AttentionConfig.implementation",
                self.implementation, f"must be one of {', '.join(ATTENTIONS)}")
        require_at_least(self, 1, "AttentionConfig", "heads", "kv_rank", "nope_dim", "value_dim",
                         "rope_theta")
        require(self.rope_dim >= 0 and self.rope_dim % 2 == 0, "AttentionConfig.rope_dim",
                self.rope_dim, "must be even")
        require(self.yarn is None or self.rope_theta > 1, "AttentionConfig.rope_theta",
                self.rope_theta, "must be above 1 where yarn extends the context")

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        plain: float = (self.nope_dim + self.rope_dim) ** -0.5
        return plain if self.yarn is None else plain * self.yarn.score_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE, dropless, with loss-free balancing (arXiv 2408.15664).

    Attributes:
      experts: routed experts.
      top_k: routed experts that each token visits.
      shared: shared experts, one FFN of width shared * expert_ffn.
      expert_ffn: hidden width of one expert.
      dense_layers: this many first blocks keep a dense FFN.
      scale: factor on the normalised routing weights.
      balance_rate: step by which an expert's bias moves against its load; 0 turns balancing off.
    """

    experts: int
    top_k: int = 6
    shared: int = 2
    expert_ffn: int = 1536
    dense_layers: int = 1
    scale: float = 1.0
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        require(1 <= self.top_k <= self.experts, "MoEConfig.top_k", self.top_k,
                f"must be in 1..{self.experts}, the number of experts")
        require_at_least(self, 1, "MoEConfig", "expert_ffn")
        require_at_least(self, 0, "MoEConfig", "shared", "dense_layers", "scale", "balance_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
      vocab_size: rows of the token embedding and columns of the head; the tokenizer may have fewer.
      width: D, of the residual stream.
      depth: blocks.
      ffn: hidden width of a dense block's FFN.
      attention: of every block.
      moe: experts in the place of the dense FFN; none is dense FFNs throughout.
      streams: residual streams M; 1 is the plain residual, more are mHC (arXiv 2512.24880).
      sinkhorn_rounds: of mHC, how often columns and rows are normalised in turn.
      stream_layout: of mHC, how streams lie between blocks: "joined" in one array or "apart", each
        in its own; "auto", the only one of a single stream, is "apart" on TPUs, else "joined". The
        mathematics is the same.
      engram: the memory; none is no memory.
      over_encoding: OverEncoding, the baseline that joins the input embedding; none is without.
      tied_head: the head is the token embedding, transposed.
      embedding_std: standard deviation of the token embedding at the start (not published).
      norm_eps: epsilon of the backbone's norms.
      compute_dtype: dtype of activations; parameters are kept in float32.
      remat: "none" keeps every activation for the backward pass; "block" keeps what each block was
        given, and the few numbers a token that mix its streams, and computes the rest anew; "ffn"
        keeps what each FFN gave, too, so that its last product is not computed again; "outputs"
        keeps what each attention gave, too, and what splash attention wants again. "auto" is the
        first of "none", "outputs", "ffn" and "block" that fits the devices by a guess
        (`training.fitting`); "block" where nothing is trained.
      isolate_documents: attention, n-grams and convolution stop at document boundaries. Off is
        the reference's behaviour.
    """

    vocab_size: int
    width: int
    depth: int
    ffn: int
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig | None = None
    streams: int = 1
    sinkhorn_rounds: int = 20
    stream_layout: str = "auto"
    engram: EngramConfig | None = None
    over_encoding: OverEncodingConfig | None = None
    tied_head: bool = False
    embedding_std: float = 0.02
    norm_eps: float = 1e-6
    compute_dtype: str = "bfloat16"
    remat: str = "block"
    isolate_documents: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 1, "model", "vocab_size", "width", "depth", "ffn", "streams")
        require_at_least(self, 0, "model", "sinkhorn_rounds", "norm_eps", "embedding_std")
        require(self.compute_dtype in ("float32", "bfloat16"), "model.compute_dtype",
                self.compute_dtype, "must be float32 or bfloat16")
        require(self.remat in (*KEPT, "auto"), "model.remat", self.remat,
                f"must be one of {', '.join(KEPT)}, auto")
        require(self.stream_layout in STREAM_LAYOUTS, "model.stream_layout", self.stream_layout,
                f"must be one of {', '.join(STREAM_LAYOUTS)}")
        require(self.stream_layout == "auto" or self.streams > 1, "model.stream_layout",
                self.stream_layout, "must be auto where there is one stream")
        if self.engram is not None:
            require(self.engram.layers[-1] < self.depth, "model.engram.layers", self.engram.layers,
                    f"has a layer out of range: the model has blocks 0..{self.depth - 1}")
        if self.over_encoding is not None:
            heads = self.over_encoding.total_heads
            require(self.width % heads == 0, "model.over_encoding.heads",
                    self.over_encoding.heads,
                    f"makes {heads} sub-tables, which do not divide the width {self.width}")
        if self.moe is not None:
            require(self.moe.dense_layers < self.depth, "model.moe.dense_layers",
                    self.moe.dense_layers, f"must be below the depth {self.depth}, or no block "
                    "would use an expert")
