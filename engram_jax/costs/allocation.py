"""Where sparse capacity goes: a model's sparse parameters divided anew between experts and memory.

The paper's question (arXiv 2601.07372 section 3): of P_sparse = P_tot - P_act, a share rho stays
with routed experts and the rest becomes rows of tables, at the same P_tot, P_act and FLOPs. P_tot
counts neither the token embedding nor the head. Everything here is checked against the counted
parameter tree (`accounting.account`).
"""

import dataclasses
from collections.abc import Callable

from engram_jax.config import EngramConfig, RunConfig, require
from engram_jax.costs.accounting import Account, account
from engram_jax.hashing.addressing import sites
from engram_jax.recipes import without_memory
from engram_jax.settings import changed

PARAMETER_TOLERANCE = 1e-3
FLOPS_TOLERANCE = 1e-2
LANES = 128  # FFN widths stay multiples of it where they are, for the matrix units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One point of the allocation experiment.

    Attributes:
      run: the model.
      target: the share of the sparse parameters asked for experts.
      rho: the share that they have, (E - K) / (E_1 - K) of whole experts.
      parameters_off, flops_off: relative difference of P_tot and of FLOPs per token from the
        undivided model's.
    """

    run: RunConfig
    target: float
    rho: float
    parameters_off: float
    flops_off: float


def allocate(base: RunConfig, rho: float, memory: EngramConfig) -> Allocation:
    """`base`, a mixture-of-experts without memory, with a share rho of its sparse parameters left.

    Routed experts fall to E = K + rho (E_1 - K), rounded; the dense blocks' FFN gives up the FLOPs
    of Engram's projections; rows per head, alike for all orders, take the parameters that are left.

    Args:
      base: the model at rho = 1.
      rho: in (0, 1].
      memory: the module; its `rows_per_head` are replaced.

    Raises:
      UserError: no such model meets P_tot within 0.1 % and FLOPs within 1 %.
    """
    moe = base.model.moe
    require(0 < rho <= 1, "rho", rho, "must be in (0, 1], the share that routed experts keep")
    require(moe is not None, "model.moe", None, "has no experts to take parameters from")
    require(base.model.engram is None and base.model.over_encoding is None, "model.engram",
            base.model.engram, "is in the model already; begin with the one that has experts alone")
    assert moe is not None
    spare = moe.experts - moe.top_k
    experts = moe.top_k + round(rho * spare)
    if experts == moe.experts:
        return _checked(base, base, rho, 1.0)
    require(experts > moe.top_k, "rho", rho,
            f"leaves {experts} experts of which {moe.top_k} are picked; with {moe.experts} experts "
            f"it must be at least {0.5 / spare:.3f}")
    run = changed(base, {"name": f"{base.name}-rho-{rho:g}", "model.moe.experts": experts,
                         "model.engram": memory})
    run = with_flops(run, account(base).flops_per_token)
    run = with_parameters(run, account(base).active_params + account(base).sparse_params)
    return _checked(base, run, rho, (experts - moe.top_k) / spare)


def _checked(base: RunConfig, run: RunConfig, target: float, rho: float) -> Allocation:
    before, after = account(base), account(run)
    parameters = _countable(after) / _countable(before) - 1
    flops = after.flops_per_token / before.flops_per_token - 1
    require(abs(parameters) <= PARAMETER_TOLERANCE, "rho", target,
            f"gives {_countable(after):,} parameters where {base.name} has "
            f"{_countable(before):,}, {parameters:+.2%}; rows of fewer columns or fewer heads "
            f"come within {PARAMETER_TOLERANCE:.1%}")
    require(abs(flops) <= FLOPS_TOLERANCE, "rho", target,
            f"costs {after.flops_per_token:,} FLOPs a token where {base.name} costs "
            f"{before.flops_per_token:,}, {flops:+.2%}; a dense block or fewer heads come within "
            f"{FLOPS_TOLERANCE:.0%}")
    return Allocation(run=run, target=target, rho=rho, parameters_off=parameters, flops_off=flops)


def _countable(numbers: Account) -> int:
    """P_tot: neither embedding nor head."""
    return numbers.active_params + numbers.sparse_params


def with_flops(run: RunConfig, flops_per_token: int) -> RunConfig:
    """The run with its dense blocks' FFN as wide as brings the FLOPs a token nearest to those.

    A model without dense blocks comes back as it is.

    Raises:
      UserError: no FFN is narrow enough.
    """
    model = run.model
    dense = model.moe.dense_layers if model.moe else model.depth
    if not dense:
        return run
    unit = LANES if model.ffn % LANES == 0 and model.ffn >= 16 * LANES else 1
    each = 6 * 3 * model.width * dense * unit
    ffn = model.ffn + unit * round((flops_per_token - account(run).flops_per_token) / each)
    require(ffn >= unit, "model.ffn", ffn, f"would be needed for {flops_per_token:,} FLOPs a token "
            f"of {run.name}: its memory's projections alone cost more")
    return changed(run, {"model.ffn": ffn})


def with_parameters(run: RunConfig, parameters: int) -> RunConfig:
    """The run with as many rows per head, alike for all orders, as bring P_tot nearest to that.

    Raises:
      UserError: two rows a head are too many.
    """
    engram = run.model.engram
    assert engram is not None
    wanted = parameters - (_countable(account(run)) - _rows(run) * engram.head_dim)
    heads = engram.total_heads * len(sites(run.model))
    most = wanted // (engram.head_dim * heads)
    require(most >= 2, "rows_per_head", most, f"is what {run.name} has room for in {parameters:,} "
            "parameters; it must be at least 2")

    def sized(rows_per_head: int) -> RunConfig:
        rows = (rows_per_head,) * len(engram.rows_per_head)
        return changed(run, {"model.engram": changed(engram, {"rows_per_head": rows})})

    largest = _last_at_most(lambda count: _rows(sized(count)) * engram.head_dim, wanted, most)
    return min((sized(count) for count in (largest, largest + 1)),
               key=lambda made: abs(_rows(made) * engram.head_dim - wanted))


def _last_at_most(size: Callable[[int], int], wanted: int, most: int) -> int:
    """The largest count in 2..most whose size, which never falls, is at most `wanted`; else 2.

    Primes make sizes a little larger than `count` promises, so the search begins just below `most`.
    """
    low, step = most, 1
    while low > 2 and size(low) > wanted:
        low, step = max(2, low - step), 2 * step
    high = min(most, low + step)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle - 1)
    return low


def _rows(run: RunConfig) -> int:
    return sum(site.rows for site in sites(run.model))


def matched_baseline(run: RunConfig, name: str = "no-memory") -> RunConfig:
    """The run without memory, its dense FFN wider by the FLOPs of the memory's projections."""
    bare = changed(without_memory(run), {"name": name})
    return with_flops(bare, account(run).flops_per_token)
