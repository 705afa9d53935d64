"""What gives a network its rows: tokens in, the rows of every table on the device out.

Shapes: B sequences, T tokens, P tokens of history, H rows of a token, C columns of a row.
"""

import abc
import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import Addressing
from engram_jax.hashing.token_hash import BEFORE
from engram_jax.offload.counters import TierCounts

Tokens = jax.Array | np.ndarray


@dataclasses.dataclass
class Counters:
    """Counts what a source of rows has done.

    Attributes:
      tokens: that rows were fetched for.
      asked, read: rows, with repeats in a request and without.
      bytes: put onto the device; where each row goes is counted with the rows.
      fetch_s: spent by the worker.
      latency_s: from when a request's tokens were known until its last rows were there.
      waited_s: of that, how long somebody waited.
      tiers: of those read, what each tier did: "device cache", "host cache", and of the whole
        table "host" or "disk". Repeats in a request are no hits.
    """

    tokens: int = 0
    asked: int = 0
    read: int = 0
    bytes: int = 0
    fetch_s: float = 0.0
    latency_s: float = 0.0
    waited_s: float = 0.0
    tiers: dict[str, TierCounts] = dataclasses.field(default_factory=dict)

    def since(self, before: "Counters") -> "Counters":
        """What has been counted since these were `before`."""
        tiers = {name: counts - before.tiers[name] for name, counts in self.tiers.items()}
        return Counters(tiers=tiers, **{name: value - getattr(before, name)
                                        for name, value in vars(self).items() if name != "tiers"})

    @property
    def hidden_share(self) -> float:
        """How much of the time until rows were there nobody waited for."""
        return max(0.0, 1 - self.waited_s / self.latency_s) if self.latency_s else 1.0


class RowSource(abc.ABC):
    """Brings the rows of tokens to the device, wherever their tables are.

    A network of any kind takes rows from `source(tokens)` or, while it is busy with the batch
    before, from `source.prefetched(batches)`. An engine uses `request`, the one thing that a kind
    of source has to have.

    Args:
      addressing: tokens to row ids.
      end_id: the raw id after which a document begins, where n-grams stop; None lets them cross.

    Raises:
      UserError: a control, which cannot serve; an end id that the vocabulary does not have.
    """

    def __init__(self, addressing: Addressing, end_id: int | None = None):
        addressing.check_serves()
        most = addressing.vocab_size - 1
        require(end_id is None or (isinstance(end_id, int | np.integer) and 0 <= end_id <= most
                                   and not isinstance(end_id, bool)), "end_id", end_id,
                f"must be a raw token id, in 0..{most}, or None")
        self.addressing, self.end_id = addressing, end_id

    @property
    def history_length(self) -> int:
        """P, how many tokens before a chunk its n-grams reach."""
        return self.addressing.history_length

    @property
    def counters(self) -> Counters:
        """What it has done so far."""
        return Counters()

    @abc.abstractmethod
    def request(
        self, tokens: Tokens, history: np.ndarray | None = None,
        positions: np.ndarray | None = None, count: np.ndarray | None = None,
    ) -> Mapping[str, jax.Array]:
        """Begin to bring the rows of a chunk of tokens to the device, and wait for nothing.

        Args:
          tokens: raw ids, int32 [B, T], on the host or on the device; there they may be the result
            of something that still runs.
          history: the raw ids before them, oldest first, int32 [B, P]; -1 before the start of a
            sequence. None is all -1.
          positions: of each token in its document, int32 [B, T]; n-grams then stop at the
            document's start. None goes by `end_id`.
          count: how many tokens of each sequence are real, int32 [B]; what rows the others get does
            not matter. None is all.

        Returns:
          For each site its rows, float32 [B, T, H, C]. To take an entry is to wait for it; what
          went wrong with it is raised there:

        Raises:
          UserError: another shape, or a token that the tokenizer does not have.
          MachineError: a table cannot be read.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Stop what runs, and close the tables."""

    def __enter__(self) -> "RowSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(
        self, tokens: Tokens, history: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ) -> dict[int, jax.Array]:
        """Bring and wait for the rows of tokens, for each layer float32 [B, T, H, C].

        Arguments and errors are those of `request`.
        """
        return self.by_layer(self.request(tokens, history, positions))

    def prefetched(
        self, batches: Iterable[Any], ahead: int = 1, continued: bool = False
    ) -> Iterator[tuple[Any, dict[int, jax.Array]]]:
        """Give each batch of tokens with its rows, and fetch those of the next ones meanwhile.

        Args:
          batches: raw ids, int32 [B, T] each.
          ahead: how many batches are asked for before they are needed.
          continued: a batch's sequences go on in the next one, which is a chunk of the same text;
            else each batch is the start of its sequences.

        Raises:
          As `request`, or as `batches`, from the `next` whose turn that batch was; the batches
            before it have come by then, and those behind it come at the next ones. Where sequences
            go on, a chunk whose history has an unknown token is refused, too, and nothing comes
            behind one that is not whole numbers [B, T]: what its text would be is not known.
        """
        require(isinstance(ahead, int) and ahead >= 1, "ahead", ahead,
                "must be a whole number, at least 1")
        return _Prefetched(self, batches, ahead, continued)

    def check_shapes(self, tokens: Any, history: Any, positions: Any) -> None:
        """Refuse what `request` does not take.

        Raises:
          UserError: an array of another shape or dtype.
        """
        for name, array in (("tokens", tokens), ("history", history), ("positions", positions)):
            require(array is None or hasattr(array, "dtype"), name, type(array).__name__,
                    "must be a NumPy or jax array")
        batch = tokens.shape[:1]
        for name, array, right in (
                ("tokens", tokens, tokens.shape if tokens.ndim == 2 else "[B, T]"),
                ("history", history, (*batch, self.history_length)),
                ("positions", positions, tokens.shape)):
            if array is not None and (array.shape != right or array.dtype.kind not in "iu"):
                require(False, name, f"{array.dtype} {array.shape}",
                        f"must be whole numbers {right}")

    def by_layer(self, rows: Mapping[str, jax.Array]) -> dict[int, jax.Array]:
        """Wait for what `request` answered, and give each layer its rows, float32 [B, T, H, C]."""
        arrived = dict(rows)
        return {layer: arrived[site] for layer, site in self.addressing.layers.items()}


class _Prefetched(Iterator[tuple[Any, dict[int, jax.Array]]]):
    """Gives batches with their rows, as `RowSource.prefetched` says.

    It is no generator, because a generator that has raised an error has ended.
    """

    def __init__(self, source: RowSource, batches: Iterable[Any], ahead: int, continued: bool):
        self._source, self._batches = source, iter(batches)
        self._ahead, self._continued = ahead, continued
        self._history: np.ndarray | None = None
        self._coming: collections.deque[
            tuple[Any, Mapping[str, jax.Array] | Exception]] = collections.deque()

    def __next__(self) -> tuple[Any, dict[int, jax.Array]]:
        while len(self._coming) <= self._ahead and self._ask():
            pass
        if not self._coming:
            raise StopIteration
        tokens, rows = self._coming.popleft()
        if isinstance(rows, Exception):
            raise rows
        return tokens, self._source.by_layer(rows)

    def _ask(self) -> bool:
        """Ask for the rows of one more batch, if there is one; an error waits for its turn."""
        tokens = None
        try:
            tokens = next(self._batches)
            rows: Mapping[str, jax.Array] | Exception = self._source.request(tokens, self._history)
        except StopIteration:
            return False
        except Exception as error:
            rows = error
        if self._continued and tokens is not None:
            try:
                self._history = self._history_after(np.asarray(tokens))
            except UserError as error:
                rows, self._batches = error, iter(())
        self._coming.append((tokens, rows))
        return True

    def _history_after(self, tokens_BT: np.ndarray) -> np.ndarray:
        """The last P tokens of the sequences, [B, P]."""
        right = "[B, T]" if self._history is None else f"[{len(self._history)}, T]"
        sequences = tokens_BT.shape[:1] if self._history is None else self._history.shape[:1]
        require(tokens_BT.ndim == 2 and tokens_BT.shape[:1] == sequences
                and tokens_BT.dtype.kind in "iu", "tokens", f"{tokens_BT.dtype} {tokens_BT.shape}",
                f"must be whole numbers {right}, the sequences that go on")
        before = self._source.history_length
        history_BP = self._history
        if history_BP is None:
            history_BP = np.full((len(tokens_BT), before), BEFORE, np.int32)
        joined_BS = np.concatenate([history_BP, tokens_BT], axis=1)
        return joined_BS[:, joined_BS.shape[1] - before:]
