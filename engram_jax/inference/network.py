"""A model with caches: a chunk of tokens and its rows in, the next token of each sequence out.

The stages of a chunk are dispatched one after the other, and each waits for its own rows alone.

Shapes: B slots, T tokens of a chunk, M streams, D width, V vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.inference import caches, stages
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.stages import Context, Stage


class CachedNetwork:
    """Runs a model over chunks of tokens, and keeps what its slots hold.

    Args:
      model: the model.
      params: its parameters, as `transformer.init` makes them.
      router_bias: as `transformer.init_router_bias` makes it.
      slots, length: sequences at once (B), and tokens of each.
      pad_id: the raw token before the start of a sequence.
      isolates: the token that ends a document, if the model keeps documents apart.
      known: tokens that are drawn are below it.

    Attributes:
      tokens_B: the token that each slot drew last, int32, on the device.
    """

    def __init__(
        self, model: ModelConfig, params: dict[str, Any], router_bias: list[jax.Array | None], *,
        slots: int, length: int, pad_id: int, isolates: int | None, known: int,
    ):
        self._model, self._bias = model, router_bias
        self._params = stages.serving_params(params, model)
        self._stages = stages.stages(model)
        self._slots, self._length, self._pad_id = slots, length, pad_id
        self._isolates, self._known = isolates, known
        self.reset()

    def reset(self) -> None:
        """Empty all slots."""
        slots = self._slots
        self._cache = caches.init_cache(self._model, slots, self._length, self._pad_id)
        self.tokens_B = jnp.zeros(slots, jnp.int32)
        self._sampling = Sampling(jnp.zeros(slots), jnp.zeros(slots, jnp.int32), jnp.ones(slots),
                                  jnp.zeros(slots, jnp.uint32))
        self._draws_B = np.zeros(slots, bool)

    def clear(self, slot: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        """Empty a slot for a sequence that is drawn in this way (`sampling.Sampling`)."""
        self._cache = _cleared(self._cache, slot, self._pad_id)
        self._draws_B[slot] = temperature > 0
        self._sampling = _sampling_at(
            self._sampling, slot, temperature, top_k, top_p, np.uint32(seed))

    def read(
        self, tokens_BT: jax.Array | np.ndarray, count_B: np.ndarray,
        rows: Mapping[str, jax.Array], slot: np.ndarray | None = None, draw: bool = True,
    ) -> None:
        """Dispatch all stages of a chunk, in order.

        Args:
          tokens_BT: raw ids, int32; of all slots, or of one.
          count_B: how many of them are real, int32.
          rows: for each site; a stage's are taken when it is dispatched.
          slot: the one slot that the tokens are of, an int32 scalar; None for all.
          draw: the next tokens, too.

        Raises:
          What taking the rows raises; then only `reset` is of use.
        """
        x_BTMD, context = self._begin(tokens_BT, count_B, rows, slot)
        for stage in self._stages[1:]:
            assert stage.site is not None
            x_BTMD = self._proceed(stage, x_BTMD, rows[stage.site], context, slot)
        if draw:
            draws_B = self._draws_B if slot is None else self._draws_B[slot]
            self.tokens_B = stages.finish(
                self._head, x_BTMD, context, self._sampling, self.tokens_B, slot,
                model=self._model, known=self._known, greedy=not draws_B.any())

    def _begin(
        self, tokens_BT: jax.Array | np.ndarray, count_B: np.ndarray,
        rows: Mapping[str, jax.Array], slot: np.ndarray | None,
    ) -> tuple[jax.Array, Context]:
        """The first stage; only an input's own memory has rows in it."""
        first, cache, keys = self._stages[0], self._cache, list(self._cache.keys)
        rows_BTHC = None if first.site is None else rows[first.site]
        x_BTMD, keys[:first.stop], state, context = stages.begin(
            stages.stage_params(self._params, first), self._bias[:first.stop], keys[:first.stop],
            cache.state, tokens_BT, count_B, rows_BTHC, slot,
            model=self._model, end_id=self._isolates)
        self._cache = cache._replace(keys=keys, state=state)
        return x_BTMD, context

    def _proceed(
        self, stage: Stage, x_BTMD: jax.Array, rows_BTHC: jax.Array, context: Context,
        slot: np.ndarray | None,
    ) -> jax.Array:
        """A further stage, which begins with a fusion."""
        assert stage.layer is not None
        cache, keys, part = self._cache, list(self._cache.keys), slice(stage.start, stage.stop)
        x_BTMD, keys[part], conv_BPMD = stages.proceed(
            self._params["segments"][part], self._bias[part], keys[part],
            cache.conv.get(stage.layer), x_BTMD, rows_BTHC, context, slot,
            model=self._model, start=stage.start)
        conv = cache.conv if conv_BPMD is None else {**cache.conv, stage.layer: conv_BPMD}
        self._cache = cache._replace(keys=keys, conv=conv)
        return x_BTMD

    @functools.cached_property
    def _head(self) -> dict[str, Any]:
        """What the head reads."""
        name = "embedding" if self._model.tied_head else "head"
        return {"final_gain": self._params["final_gain"], name: self._params[name]}


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _cleared(cache: caches.Cache, slot: jax.Array, pad_id: int) -> caches.Cache:
    return caches.cleared(cache, slot, pad_id)


@jax.jit
def _sampling_at(sampling: Sampling, slot: jax.Array, *values: jax.Array) -> Sampling:
    """The settings with one slot's replaced."""
    return Sampling(*(leaf.at[slot].set(value)
                      for leaf, value in zip(sampling, values, strict=True)))
