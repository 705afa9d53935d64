"""The loss of a state on the fixed validation split."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from engram_jax.config import RunConfig
from engram_jax.data.batches import validation_batches
from engram_jax.runs.directory import bits_per_byte
from engram_jax.runs.reader import Inputs
from engram_jax.training.placement import put, single_mesh
from engram_jax.training.state import TrainState, to_be_read
from engram_jax.training.step import evaluation_step


class Evaluator(Protocol):
    """Evaluates a state; `before_each` is called before each batch, and may raise."""

    def __call__(self, state: TrainState,
                 before_each: Callable[[], None] = ...) -> "Evaluation": ...


class Evaluation(NamedTuple):
    """loss in nats a token, bits_per_byte of text, and the tokens that were predicted."""

    loss: float
    bits_per_byte: float
    tokens: int


def evaluator(
    run: RunConfig, inputs: Inputs, mesh: Mesh | None = None
) -> Evaluator:
    """A function that evaluates states that lie on `mesh` (None: on this process's first device).

    It compiles on its first call. Of a state it reads `state.READ` alone.

    Raises:
      UserError: there is not enough text to validate on.
    """
    mesh = mesh or single_mesh()
    mine = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    validation_batches(inputs.tokens, run.data, **mine)  # now, not when the training is done
    step = jax.jit(evaluation_step(run, inputs.addressing, mesh))

    def evaluate(state: TrainState,
                 before_each: Callable[[], None] = lambda: None) -> Evaluation:
        total, weight, waiting = 0.0, 0.0, None
        batches = validation_batches(
            inputs.tokens, run.data, run.training.evaluate_batches, **mine)
        for batch in batches:
            before_each()
            sums = step(to_be_read(state), put(batch, mesh))
            if waiting:  # read while the next batch is under way; never more than two are
                total, weight = total + float(waiting[0]), weight + float(waiting[1])
            waiting = sums
        assert waiting, "there is at least one batch"
        total, weight = total + float(waiting[0]), weight + float(waiting[1])
        loss = total / weight
        per_byte = bits_per_byte(loss, inputs.tokens.validation_bytes_per_token)
        return Evaluation(loss, per_byte, int(weight))

    return evaluate
