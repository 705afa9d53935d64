"""Many sequences through one model: static slots that sequences join and leave.

Everything on the device is a pure function of `stages`; this is the one driver. A step of it runs a
chunk of one prompt, if one waits, and one token of every sequence that is being decoded. A decoding
step's front stage is dispatched while the tokens that it reads are still on their way to the host;
the host then hashes them and fetches their rows for the stages behind.

Shapes: B slots, T tokens of a chunk, P tokens of history.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ModelConfig, require
from engram_jax.inference import caches, stages
from engram_jax.inference.device_rows import Rows
from engram_jax.inference.sampling import Sampling
from engram_jax.offload.prefetch import Answer, Chunk, reach_numpy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the engine.

    Attributes:
      prompt: raw token ids, at least one.
      tokens: how many to generate at most; generation also ends behind the end token.
      temperature, top_k, top_p, seed: as in `sampling.Sampling`; the default is greedy.
    """

    prompt: tuple[int, ...]
    tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt", self.prompt, "must have at least one token")
        require(self.tokens >= 1, "tokens", self.tokens, "must be at least 1")
        require(0 <= self.temperature < float("inf"), "temperature", self.temperature,
                "must not be negative, nor infinite")
        require(0 <= self.top_k < 2**31, "top_k", self.top_k,
                "must be in 0..2**31 - 1; 0 is all")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0..2**32 - 1")


class Event(NamedTuple):
    """A token of request `number`, counted from 0 as they were submitted; `done`: its last."""

    number: int
    token: int
    done: bool


@dataclasses.dataclass
class _Sequence:
    """A request on its way: `read` tokens of the prompt are in the cache, `drawn` tokens have been
    dispatched and `told` of them reported."""

    number: int
    request: Request
    read: int = 0
    drawn: int = 0
    told: int = 0
    done: bool = False


class Engine:
    """Generates for many requests at once.

    Args:
      model: the model.
      params: its parameters, as `transformer.init` makes them.
      router_bias: as `transformer.init_router_bias` makes it.
      rows: where its rows come from.
      pad_id: the raw token before the start of a sequence, as in training.
      end_id: the token that ends a document, and with it a generation; None is no such token.
      known: tokens that there are, in prompts and to be generated, are below it; 0 is all.
      slots: sequences at once (B).
      length: tokens of a slot, prompt and generated ones together.
      chunk: tokens of a prompt that one step reads (T).
      overlap: dispatch what needs no rows before they are there; off, to be compared with.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: dict[str, Any],
        router_bias: list[jax.Array | None],
        rows: Rows,
        *,
        pad_id: int,
        end_id: int | None = None,
        known: int = 0,
        slots: int = 8,
        length: int = 1024,
        chunk: int = 256,
        overlap: bool = True,
    ):
        for name, value in (("slots", slots), ("length", length), ("chunk", chunk)):
            require(value >= 1, name, value, "must be at least 1")
        self._model, self._rows = model, rows
        self._pad_id, self._end_id, self._length = pad_id, end_id, length
        self._chunk, self._overlap = min(chunk, length), overlap
        self._known = known or model.vocab_size
        params = stages.serving_params(params, model)
        self._params, self._bias = params, router_bias
        self._stages = stages.stages(model)
        self._cache = caches.init_cache(model, slots, length, pad_id)
        self._tokens_B = jnp.zeros(slots, jnp.int32)
        self._sampling = Sampling(jnp.zeros(slots), jnp.zeros(slots, jnp.int32), jnp.ones(slots),
                                  jnp.zeros(slots, jnp.uint32))
        # The last tokens of each slot, the one that is read next included, oldest first.
        self._window_BP = np.full((slots, caches.history_length(model) + 1), pad_id, np.int32)
        self._slots: list[_Sequence | None] = [None] * slots
        self._fresh: set[int] = set()  # slots whose token in `_tokens_B` has not been told
        self._waiting: collections.deque[_Sequence] = collections.deque()
        # The rows of the prompt's chunk that is read next: request, start, rows.
        self._ahead: tuple[int, int, Answer] | None = None
        self._submitted = 0

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number.

        Raises:
          UserError: it does not fit into a slot, or has tokens that there are not.
        """
        self._check(request)
        self._waiting.append(_Sequence(self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def _check(self, request: Request) -> None:
        prompt, needed = request.prompt, len(request.prompt) + request.tokens
        require(needed <= self._length, "prompt", f"{len(prompt)} tokens",
                f"with {request.tokens} more to generate needs {needed} places, and a sequence "
                f"has {self._length}")
        for extreme in (min(prompt), max(prompt)):
            require(0 <= extreme < self._known, "prompt", extreme,
                    f"is no token: ids are in 0..{self._known - 1}")

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """The tokens of each request, the end token included.

        Raises:
          UserError: as `submit`, before any is begun; or others are on their way, whose tokens
            would be lost.
        """
        require(not self.busy, "generate", "busy", "others are on their way; go on with `step`")
        requests = list(requests)
        for request in requests:
            self._check(request)
        out: dict[int, list[int]] = {self.submit(request): [] for request in requests}
        while self.busy:
            for event in self.step():
                out[event.number].append(event.token)
        return list(out.values())

    @property
    def busy(self) -> bool:
        """Whether requests are on their way."""
        return bool(self._waiting) or any(self._slots)

    def step(self) -> list[Event]:
        """One step; the tokens that reached the host in it.

        Raises:
          Whatever went wrong while rows were fetched. The engine is of no use afterwards.
        """
        self._join()
        self._read_prompt()
        self._look_ahead()
        return self._decode() if any(self._decoding()) else self._told()

    def _join(self) -> None:
        """Waiting requests into free slots."""
        for slot, sequence in enumerate(self._slots):
            if sequence is None and self._waiting:
                joined = self._slots[slot] = self._waiting.popleft()
                self._cache = _cleared(self._cache, slot, self._pad_id)
                request = joined.request
                self._sampling = _sampling_at(
                    self._sampling, slot, request.temperature, request.top_k, request.top_p,
                    np.uint32(request.seed))
                self._window_BP[slot] = self._pad_id

    def _reading(self) -> tuple[int, _Sequence] | None:
        """The slot whose prompt is read next: the oldest request's."""
        slots = [(sequence.number, slot) for slot, sequence in enumerate(self._slots)
                 if sequence and sequence.read < len(sequence.request.prompt)]
        if not slots:
            return None
        slot = min(slots)[1]
        sequence = self._slots[slot]
        assert sequence is not None
        return slot, sequence

    def _read_prompt(self) -> None:
        """A chunk of one prompt."""
        if (found := self._reading()) is None:
            return
        slot, sequence = found
        prompt, start = sequence.request.prompt, sequence.read
        chunk = self._chunk_of(sequence, start)
        count = int(chunk.count_B[0])
        ahead, self._ahead = self._ahead, None
        answer = ahead[2] if ahead and ahead[:2] == (sequence.number, start) else None
        last = start + count == len(prompt)
        self._dispatch(jnp.asarray(chunk.tokens_BT), chunk.count_B, np.array(slot, np.int32),
                       lambda: chunk, answer, last)
        sequence.read += count
        if last:
            sequence.drawn = 1
            self._fresh.add(slot)
            kept = min(len(prompt), self._window_BP.shape[1])
            self._window_BP[slot, self._window_BP.shape[1] - kept:] = prompt[-kept:]

    def _look_ahead(self) -> None:
        """Begin to fetch the rows of the next chunk of a prompt, while the device has work."""
        if not self._overlap or not self._rows.on_host or self._ahead is not None:
            return
        found = self._reading()
        sequence = found[1] if found else self._waiting[0] if self._waiting else None
        if sequence is not None:
            chunk = self._chunk_of(sequence, sequence.read)
            self._ahead = sequence.number, sequence.read, self._rows.ask(chunk)

    def _chunk_of(self, sequence: _Sequence, start: int) -> Chunk:
        """The chunk of a prompt from `start` on, with pad tokens behind its end."""
        prompt = np.asarray(sequence.request.prompt, np.int32)
        history = caches.history_length(self._model)
        padded = np.full(history + len(prompt) + self._chunk, self._pad_id, np.int32)
        padded[history : history + len(prompt)] = prompt
        tokens_1T = padded[None, start + history : start + history + self._chunk]
        count_1 = np.array([min(self._chunk, len(prompt) - start)], np.int32)
        return self._hosted(tokens_1T, count_1, padded[None, start : start + history])

    def _hosted(
        self, tokens_BT: np.ndarray, count_B: np.ndarray, history_BP: np.ndarray
    ) -> Chunk:
        reach_BT = None
        if self._isolates is not None:
            reach_BT = reach_numpy(tokens_BT, history_BP, self._isolates)
        return Chunk(tokens_BT, count_B, history_BP, reach_BT)

    @property
    def _isolates(self) -> int | None:
        """The token that ends a document, if the model keeps documents apart."""
        return self._end_id if self._model.isolate_documents else None

    def _decoding(self) -> list[bool]:
        """For each slot: does it draw another token now?"""
        return [sequence is not None and not sequence.done
                and 0 < sequence.drawn < sequence.request.tokens for sequence in self._slots]

    def _decode(self) -> list[Event]:
        """A token of every sequence that is being decoded."""
        active_B = np.array(self._decoding(), np.int32)
        before, fresh, self._fresh = self._tokens_B, self._fresh, set()
        events: list[Event] = []

        def host() -> Chunk:
            events.extend(self._tell(before, fresh))
            fresh.clear()
            return self._hosted(
                self._window_BP[:, -1:].copy(), active_B, self._window_BP[:, :-1].copy())

        self._dispatch(before[:, None], active_B, None, host, None, True)
        for slot in np.flatnonzero(active_B):
            sequence = self._slots[slot]
            if sequence is not None and not sequence.done:
                sequence.drawn += 1
                self._fresh.add(int(slot))
        return events + self._tell(before, fresh)  # unless something had to wait for the tokens

    def _told(self) -> list[Event]:
        """The tokens of the last step."""
        fresh, self._fresh = self._fresh, set()
        return self._tell(self._tokens_B, fresh)

    def _tell(self, tokens_B: jax.Array, fresh: set[int]) -> list[Event]:
        """Wait for tokens, and free the slots of sequences that end with them."""
        events = []
        with jax.profiler.TraceAnnotation("wait for tokens"):
            read_B = np.asarray(tokens_B) if fresh else ()
        for slot in sorted(fresh):
            sequence, token = self._slots[slot], int(read_B[slot])
            assert sequence is not None
            self._window_BP[slot] = np.append(self._window_BP[slot, 1:], token)
            sequence.told += 1
            sequence.done = token == self._end_id or sequence.told == sequence.request.tokens
            events.append(Event(sequence.number, token, sequence.done))
            if sequence.done:
                self._slots[slot] = None
                self._fresh.discard(slot)  # what was drawn before this token had been seen
        return events

    def _dispatch(
        self, tokens_BT: jax.Array, count_B: np.ndarray, slot: np.ndarray | None, host: Any,
        answer: Answer | None, draw: bool,
    ) -> None:
        """All stages of a chunk."""
        model, cache, rows = self._model, self._cache, self._rows
        first, *rest = self._stages
        if not rest and first.site is None:
            pass  # no memory
        elif answer is None and not rows.on_host:
            answer = rows.on_device(tokens_BT, count_B, cache.place, slot)
        elif answer is None and (not self._overlap or first.site is not None):
            answer = rows.ask(host())
        if not self._overlap and answer is not None:
            for stage in self._stages:
                if stage.site is not None:
                    jax.block_until_ready(answer(stage.site))
        keys, conv = list(cache.keys), dict(cache.conv)
        x_BTMD, keys[: first.stop], place, context = stages.begin(
            stages.stage_params(self._params, first), self._bias[: first.stop],
            keys[: first.stop], cache.place, tokens_BT, count_B,
            answer(first.site) if first.site is not None and answer else None, slot,
            model=model, end_id=self._isolates)
        if answer is None and rest:
            answer = rows.ask(host())
        for stage in rest:
            assert stage.site is not None
            assert stage.layer is not None
            assert answer is not None
            part = slice(stage.start, stage.stop)
            x_BTMD, keys[part], conv_BPMD = stages.proceed(
                self._params["segments"][part], self._bias[part], keys[part],
                conv.get(stage.layer), x_BTMD, answer(stage.site), context, slot,
                model=model, start=stage.start)
            if conv_BPMD is not None:
                conv[stage.layer] = conv_BPMD
        self._cache = caches.Cache(keys, conv, place)
        if draw:
            self._tokens_B = stages.finish(
                self._head, x_BTMD, context, self._sampling, self._tokens_B, slot,
                model=model, known=self._known)

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
