"""What a run costs: parameters, FLOPs and table bytes, counted from the abstract parameter tree.

Counting rules (docs/spec.md section 3.1): *total* counts the LM head but not the token
embedding; *active* and *sparse* count neither; *engram* counts tables alone.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax

from engram_jax import recipes
from engram_jax.config import ModelConfig, RunConfig
from engram_jax.hashing.addressing import sites
from engram_jax.model import parameters, transformer
from engram_jax.tables import rounding

ISO_PARAMETER_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one kind: how many there are, and how many a token meets."""

    total: int
    active: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """The numbers of `engram-jax describe`.

    Attributes:
      parts: by kind, in the order of the network.
      total_params: with the LM head, without the token embedding.
      active_params: met by one token, without embedding and head.
      sparse_params: total without the head, less active: routed experts that are not picked, and
        rows that are not read.
      engram_params: memory tables alone.
      rho: the share of the sparse parameters that is routed experts. Of a model with a baseline
        of the same size, the share of the baseline's sparse parameters that its tables leave to
        experts: 1 - tables / P_sparse(baseline). None where nothing is sparse.
      rho_of: the recipe whose sparse parameters are the measure.
      flops_per_token: of training (forward and backward), matrices and attention, at the run's
        sequence length; what is recomputed is not counted.
      table_bytes_per_token: bytes of the rows that one token reads.
      attention: the implementation that was set; what "auto" stands for, the device decides.
      stream_layout: how mHC's streams lie, as it was set; "" of one stream.
    """

    parts: dict[str, Part]
    total_params: int
    active_params: int
    sparse_params: int
    engram_params: int
    rho: float | None
    rho_of: str
    flops_per_token: int
    table_bytes_per_token: int
    attention: str
    stream_layout: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parts(model: ModelConfig) -> dict[str, Part]:
    """Parameters by kind, as the model declares them."""
    counts: collections.Counter[str] = collections.Counter()
    for parameter in jax.tree.leaves(
            transformer.declared(model), is_leaf=parameters.is_parameter):
        counts[parameter.part] += parameter.value.size
    by_kind = {kind: Part(total=counts[kind], active=counts[kind])
             for kind in parameters.PARTS if counts[kind]}
    if model.moe is not None:
        routed = counts["routed experts"]
        by_kind["routed experts"] = Part(
            total=routed, active=routed * model.moe.top_k // model.moe.experts)
    for site in sites(model):
        by_kind[f"table {site.name}"] = Part(
            total=site.rows * site.dim,
            active=site.hash_config.total_heads * site.dim)
    return by_kind


@functools.lru_cache(maxsize=256)
def account(run: RunConfig) -> Account:
    """Count a run."""
    model = run.model
    by_kind = parts(model)
    embedding = by_kind["token embedding"].total
    head = embedding if model.tied_head else by_kind["LM head"].total
    counted = {k: p for k, p in by_kind.items() if k not in ("token embedding", "LM head")}
    without_head = sum(part.total for part in counted.values())
    active = sum(part.active for part in counted.values())
    tables = sum(part.total for kind, part in counted.items() if kind.startswith("table "))
    rows_read = sum(part.active for kind, part in counted.items() if kind.startswith("table "))
    rho, rho_of = _allocation(run, without_head, without_head - active, tables)
    return Account(
        parts=by_kind,
        total_params=without_head + head,
        active_params=active,
        sparse_params=without_head - active,
        engram_params=tables,
        rho=rho,
        rho_of=rho_of,
        flops_per_token=6 * (active - rows_read + head) + _attention_flops(run),
        table_bytes_per_token=sum(
            site.hash_config.total_heads * site.dim
            * rounding.storage(site.hash_config.table_dtype).itemsize for site in sites(model)),
        attention=model.attention.implementation,
        stream_layout=model.stream_layout if model.streams > 1 else "",
    )


def _allocation(
    run: RunConfig, without_head: int, sparse: int, tables: int
) -> tuple[float | None, str]:
    if run.baseline:
        baseline = account(recipes.recipe(run.baseline))
        size = baseline.active_params + baseline.sparse_params
        if abs(without_head - size) <= ISO_PARAMETER_TOLERANCE * size:
            return 1 - tables / baseline.sparse_params, run.baseline
    if sparse == 0:
        return None, run.name
    return 1 - tables / sparse, run.name


def _attention_flops(run: RunConfig) -> int:
    """Scores and mixing of one token, forward and backward, over half the sequence on average."""
    attention = run.model.attention
    per_pair = 2 * attention.heads * (
        attention.nope_dim + attention.rope_dim + attention.value_dim)
    return 3 * per_pair * run.model.depth * (run.data.sequence_length + 1) // 2


def described(run: RunConfig) -> str:
    """The account as a table for people."""
    numbers, model = account(run), run.model
    lines = [
        f"{run.name}: {model.depth} blocks of width {model.width}, {model.streams} residual "
        f"stream{'s' if model.streams > 1 else ''}, sequences of {run.data.sequence_length}",
        "",
        f"  {'part':<28}{'parameters':>12}{'a token meets':>16}",
    ]
    for kind, part in numbers.parts.items():
        active = "not counted" if kind in ("token embedding", "LM head") else short(part.active)
        lines.append(f"  {kind:<28}{short(part.total):>12}{active:>16}")
    lines += [
        "",
        f"  {'total (with LM head)':<28}{short(numbers.total_params):>12}",
        f"  {'active per token':<28}{short(numbers.active_params):>12}",
        f"  {'sparse':<28}{short(numbers.sparse_params):>12}",
        f"  {'memory tables':<28}{short(numbers.engram_params):>12}",
        f"  {'rho (experts of the sparse)':<28}{_rho(numbers, run):>12}",
        f"  {'FLOPs per trained token':<28}{short(numbers.flops_per_token):>12}",
        f"  {'table bytes per token':<28}{numbers.table_bytes_per_token:>12,}",
        f"  {'attention by':<28}{_in_words(numbers.attention, 'splash', 'xla'):>12}",
    ]
    if numbers.stream_layout:
        lines.append(f"  {'streams lie':<28}"
                     f"{_in_words(numbers.stream_layout, 'apart', 'joined'):>12}")
    return "\n".join(lines)


def _in_words(setting: str, on_tpus: str, elsewhere: str) -> str:
    return f"auto: {on_tpus} on TPUs, else {elsewhere}" if setting == "auto" else setting


def _rho(numbers: Account, run: RunConfig) -> str:
    if numbers.rho is None:
        return "-"
    of = "" if numbers.rho_of == run.name else f" of {numbers.rho_of}'s"
    return f"{numbers.rho:.4f}{of}"


def short(count: float) -> str:
    """4 significant digits with K, M, B or T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if count >= limit:
            return f"{count / limit if unit != 'K' else count / 1e3:.4g}{unit}"
    return f"{count:,.0f}"
