"""Many sequences through one model: static slots that sequences join and leave.

Everything on the device is a pure function of `stages`, which `network` dispatches; this is the one
driver. A step of it reads a chunk of one prompt, if one waits, and draws one token of every
sequence that is being decoded. Rows are asked for first and taken last: what needs none is
dispatched while they are fetched, and a source on the host begins when the tokens of the step
before have come.

Shapes: B slots, T tokens of a chunk, P tokens of history.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from engram_jax.config import ModelConfig, require
from engram_jax.inference.network import CachedNetwork
from engram_jax.offload.source import RowSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Asks for the tokens that follow a prompt.

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
    """Tells a token of request `number`, counted from 0 as submitted; `done` if it is the last."""

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


class _Chunk(NamedTuple):
    """Holds tokens of a prompt as `RowSource.request` takes them; all int32."""

    tokens_BT: np.ndarray
    history_BP: np.ndarray
    count_B: np.ndarray


class Engine:
    """Generates for many requests at once.

    Args:
      model: the model.
      params: its parameters, as `transformer.init` makes them.
      router_bias: as `transformer.init_router_bias` makes it.
      rows: where its rows come from; closed with this.
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
        rows: RowSource,
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
        self._rows, self._pad_id, self._end_id = rows, pad_id, end_id
        self._length, self._chunk, self._overlap = length, min(chunk, length), overlap
        self._known = known or model.vocab_size
        self._network = CachedNetwork(
            model, params, router_bias, slots=slots, length=length, pad_id=pad_id,
            isolates=end_id if model.isolate_documents else None, known=self._known)
        # The last tokens of each slot that are known, oldest first.
        self._history_BP = np.full((slots, rows.history_length), pad_id, np.int32)
        self._slots: list[_Sequence | None] = [None] * slots
        self._fresh: set[int] = set()  # slots whose last token has not been told
        self._waiting: collections.deque[_Sequence] = collections.deque()
        # The rows of the prompt's chunk that is read next: request, start, rows.
        self._ahead: tuple[int, int, Mapping[str, jax.Array]] | None = None
        self._submitted = 0

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close where rows come from; nothing can be generated afterwards."""
        self._rows.close()

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
                f"with {request.tokens} more to generate needs {needed} positions, and a sequence "
                f"has {self._length}")
        for extreme in (min(prompt), max(prompt)):
            require(0 <= extreme < self._known, "prompt", extreme,
                    f"is no token: ids are in 0..{self._known - 1}")

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """Generate the tokens of each request, the end token included.

        Raises:
          UserError: as `submit`, before any is begun; or others are on their way, whose tokens
            would be lost.
          As `step`.
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
        """Take one step, and tell the tokens that reached the host in it.

        Raises:
          Whatever went wrong while rows were fetched. All requests that were on their way are given
          up; the engine is empty then and takes new ones.
        """
        try:
            self._join()
            self._read_prompt()
            self._look_ahead()
            return self._decode() if any(self._decoding()) else self._told()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Forget all requests: what a program had been given when it failed is lost."""
        self._slots = [None] * len(self._slots)
        self._fresh, self._ahead = set(), None
        self._waiting.clear()
        self._network.reset()

    def _join(self) -> None:
        """Put waiting requests into free slots."""
        for slot, sequence in enumerate(self._slots):
            if sequence is None and self._waiting:
                joined = self._slots[slot] = self._waiting.popleft()
                request = joined.request
                self._network.clear(
                    slot, request.temperature, request.top_k, request.top_p, request.seed)
                self._history_BP[slot] = self._pad_id

    def _reading(self) -> tuple[int, _Sequence] | None:
        """Find the slot whose prompt is read next, the oldest request's."""
        reading = [(sequence.number, slot, sequence) for slot, sequence in enumerate(self._slots)
                   if sequence and sequence.read < len(sequence.request.prompt)]
        return min(reading)[1:] if reading else None

    def _read_prompt(self) -> None:
        """Read a chunk of one prompt."""
        if (reading := self._reading()) is None:
            return
        slot, sequence = reading
        prompt, start = sequence.request.prompt, sequence.read
        chunk = self._chunk_of(sequence)
        ahead, self._ahead = self._ahead, None
        rows = (ahead[2] if ahead and ahead[:2] == (sequence.number, start)
                else self._request(*chunk))
        sequence.read += int(chunk.count_B[0])
        last = sequence.read == len(prompt)
        self._dispatch(chunk.tokens_BT, chunk.count_B, rows, np.array(slot, np.int32), last)
        if last:
            sequence.drawn = 1
            self._fresh.add(slot)
            self._remember(slot, prompt)

    def _look_ahead(self) -> None:
        """Begin to fetch the rows of the next chunk of a prompt, while the device has work."""
        if not self._overlap or self._ahead is not None:
            return
        reading = self._reading()
        sequence = reading[1] if reading else self._waiting[0] if self._waiting else None
        if sequence is not None:
            self._ahead = (sequence.number, sequence.read,
                           self._request(*self._chunk_of(sequence)))

    def _chunk_of(self, sequence: _Sequence) -> _Chunk:
        """Cut the chunk of a prompt that is read next, with pad tokens behind its end."""
        prompt, before = np.asarray(sequence.request.prompt, np.int32), self._history_BP.shape[1]
        padded_S = np.full(before + len(prompt) + self._chunk, self._pad_id, np.int32)
        padded_S[before:before + len(prompt)] = prompt
        start, middle = sequence.read, sequence.read + before
        count_1 = np.array([min(self._chunk, len(prompt) - start)], np.int32)
        return _Chunk(padded_S[None, middle:middle + self._chunk], padded_S[None, start:middle],
                      count_1)

    def _request(
        self, tokens_BT: jax.Array | np.ndarray, history_BP: np.ndarray, count_B: np.ndarray
    ) -> Mapping[str, jax.Array]:
        return self._rows.request(tokens_BT, history_BP, count=count_B)

    def _decoding(self) -> list[bool]:
        """For each slot: does it draw another token now?"""
        return [sequence is not None and not sequence.done
                and 0 < sequence.drawn < sequence.request.tokens for sequence in self._slots]

    def _decode(self) -> list[Event]:
        """Draw a token of every sequence that is being decoded."""
        active_B = np.array(self._decoding(), np.int32)
        before_B, fresh, self._fresh = self._network.tokens_B, self._fresh, set()
        tokens_B1 = before_B[:, None]
        rows = self._request(tokens_B1, self._history_BP.copy(), active_B)
        self._dispatch(tokens_B1, active_B, rows)
        for slot in np.flatnonzero(active_B):
            sequence = self._slots[slot]
            assert sequence is not None
            sequence.drawn += 1
            self._fresh.add(int(slot))
        return self._tell(before_B, fresh)

    def _dispatch(
        self, tokens_BT: jax.Array | np.ndarray, count_B: np.ndarray,
        rows: Mapping[str, jax.Array], slot: np.ndarray | None = None, draw: bool = True,
    ) -> None:
        if not self._overlap:
            rows = jax.block_until_ready(dict(rows))
        self._network.read(tokens_BT, count_B, rows, slot, draw)

    def _told(self) -> list[Event]:
        """Tell the tokens of the last step."""
        fresh, self._fresh = self._fresh, set()
        return self._tell(self._network.tokens_B, fresh)

    def _tell(self, tokens_B: jax.Array, fresh: set[int]) -> list[Event]:
        """Wait for tokens, and free the slots of sequences that end with them."""
        events = []
        with jax.profiler.TraceAnnotation("wait for tokens"):
            told_B = np.asarray(tokens_B) if fresh else ()
        for slot in sorted(fresh):
            sequence, token = self._slots[slot], int(told_B[slot])
            assert sequence is not None
            self._remember(slot, (token,))
            sequence.told += 1
            sequence.done = token == self._end_id or sequence.told == sequence.request.tokens
            events.append(Event(sequence.number, token, sequence.done))
            if sequence.done:
                self._slots[slot] = None
                self._fresh.discard(slot)  # what was drawn before this token had been seen
        return events

    def _remember(self, slot: int, tokens: tuple[int, ...]) -> None:
        """Move tokens into a slot's history, oldest first."""
        joined = np.append(self._history_BP[slot], np.array(tokens, np.int32))
        self._history_BP[slot] = joined[len(joined) - self._history_BP.shape[1]:]
