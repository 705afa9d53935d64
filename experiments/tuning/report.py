"""Losses of the trials, best first for each kind."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from engram_jax.results import arms, figures
from engram_jax.results.arms import Result
from experiments.tuning.configs import BEST, TRIALS, TRIALS_BY_ARM

FIGURE = "loss_by_rate.png"
COLOURS = dict(zip(TRIALS, (figures.DARK, figures.BLUE, figures.ORANGE), strict=True))


def table(results: Sequence[Result]) -> str:
    """A line each trial; the first of a kind is its best. Of several seeds a line each arm, with
    what it is better than the best without memory."""
    if len({result["seed"] for result in results}) > 1:
        return arms.table(results, BEST["no-memory"])
    lines = [f"{'trial':<18}{'loss':>9}{'rate':>8}{'embedding':>11}{'table optimizer':>17}"
             f"{'times':>7}{'table std':>11}"]
    for kind, tried in _by_kind(results).items():
        memory = kind != "no-memory"
        lines += [
            f"{name:<18}{loss:>9.4f}{trial.rate:>8g}{trial.embedding_std:>11g}"
            f"{trial.table_optimizer if memory else '-':>17}"
            f"{f'x{trial.multiplier:g}' if memory else '-':>7}"
            f"{f'{trial.table_std:g}' if memory else '-':>11}" for name, loss in tried
            for trial in [TRIALS_BY_ARM[name]]]
    return "\n".join(lines)


def _by_kind(results: Sequence[Result]) -> dict[str, list[tuple[str, float]]]:
    """Each kind's arms and their losses, the lowest first, those that diverged last."""
    grouped: dict[str, list[tuple[str, float]]] = {kind: [] for kind in TRIALS}
    for result in results:
        name = arms.arm(result)
        grouped[name.rpartition("-")[0]].append((name, float(result["loss"])))
    return {kind: sorted(those, key=lambda each: (each[1] != each[1], each[1]))
            for kind, those in grouped.items() if those}


def figure(results: Sequence[Result]) -> Figure:
    """Losses against the backbone's rate; the best of each kind is filled."""
    drawn, (axes,) = figures.panels(1)
    for kind, tried in _by_kind(results).items():
        axes.plot([TRIALS_BY_ARM[name].rate for name, _ in tried], [loss for _, loss in tried], "o",
                  color=COLOURS[kind], markerfacecolor="white", markersize=6)
        best, loss = tried[0]
        axes.plot(TRIALS_BY_ARM[best].rate, loss, "o", color=COLOURS[kind], markersize=6,
                  label=f"{kind.replace('-', ' ')}: {loss:.3f}")
    axes.set_xscale("log")
    rates = [2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("the backbone's learning rate")
    axes.set_ylabel("validation loss (nats a token)")
    axes.legend(title="the best trial", frameon=False)
    return drawn
