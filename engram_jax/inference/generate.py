"""Generation by recomputing the whole window for each token: simple, exact and slow.

Shapes: T the window, the run's sequence length.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import RunConfig, require
from engram_jax.inference.sampling import sample
from engram_jax.memory.sites import gather_rows
from engram_jax.model import transformer
from engram_jax.training.inputs import Reader
from engram_jax.training.state import TrainState
from engram_jax.training.step import row_ids


def generate(
    run: RunConfig,
    reader: Reader,
    state: TrainState,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Text that follows `prompt`, piece by piece; ends early at the end token.

    Args:
      run, reader, state: a trained run.
      prompt: any text; beyond T tokens only its end is seen.
      tokens: how many tokens to generate.
      temperature: 0 is greedy.
      seed: of the draws.

    Raises:
      UserError: an empty prompt or a negative temperature.
    """
    tokenizer = reader.tokenizer
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    require(len(ids) > 0, "prompt", prompt, "must have at least one token")
    require(temperature >= 0, "temperature", temperature, "must not be negative")
    require(tokens >= 1, "tokens", tokens, "must be at least 1")
    return _pieces(run, reader, state, ids, tokens, temperature, seed)


def _pieces(
    run: RunConfig, reader: Reader, state: TrainState, ids: list[int], tokens: int,
    temperature: float, seed: int,
) -> Iterator[str]:
    window, end = run.data.sequence_length, reader.end_id
    known = reader.vocab_size  # the model may have room for more

    @jax.jit
    def next_token(tokens_1T: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        # What stands behind `last` is padding; the model is causal and never sees it.
        starts_1T = jnp.concatenate(
            [jnp.zeros((1, 1), bool), tokens_1T[:, :-1] == end], axis=1)
        batch = {"tokens_BT": tokens_1T, "starts_BT": starts_1T}
        rows = gather_rows(
            run.model, state.tables, row_ids(run, reader.addressing, batch))
        logits_1TV, _ = transformer.apply(
            state.params, tokens_1T, rows, state.router_bias, run.model, starts_1T)
        return sample(logits_1TV[0, last, :known], key, jnp.float32(temperature))

    text = reader.tokenizer.decode(ids)
    for number in range(tokens):
        seen = ids[-window:]
        padded_1T = np.full((1, window), reader.pad_id, np.int32)
        padded_1T[0, :len(seen)] = seen
        key = jax.random.fold_in(jax.random.key(seed), number)
        token = int(next_token(padded_1T, np.int32(len(seen) - 1), key))
        if token == end:
            break
        ids = [*ids, token]
        longer = reader.tokenizer.decode(ids)
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):  # else in the middle of a character
            yield longer[len(text):]
            text = longer
