"""Token streams to batches: shuffled windows to train on, all of the text in order to validate on.

Shapes: B sequences of a batch (of this process, where there are several), T tokens of a sequence.
A window is T + 1 tokens of a stream, window i from token i * T on: T tokens and the T that follow
them, so that neighbours share one token and each token is predicted once.
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from engram_jax.config import DataConfig, require
from engram_jax.data.tokens import TokenData, TokenStream
from engram_jax.errors import UserError

Batch = dict[str, np.ndarray]


def train_batches(data: TokenData, config: DataConfig, *, process_index: int = 0,
                  process_count: int = 1) -> grain.DatasetIterator[Batch]:
    """Batches of the training stream, forever, all windows in a new order each epoch.

    The order depends on `config.seed` and the number of windows alone: with more processes each
    gets its rows of the same batches. A batch may span two epochs. Up to T tokens at the end of
    the stream, too few for a window, are not trained on.

    Returns:
      A Grain iterator (`get_state`, `set_state`; Orbax v1 saves and loads it as it is) of
      tokens_BT int32, targets_BT int32 (the tokens that follow) and starts_BT bool (the token is
      the first of a document). Its state does not depend on the number of processes.

    Raises:
      UserError: the stream is shorter than a window or a batch, or the batch does not divide
        among the processes.
    """
    rows = _rows(config, process_index, process_count)
    windows = _whole_windows(data, config)
    stream = data.train  # opened here, not in a thread

    def load(windows_B: np.ndarray) -> Batch:
        return _train_batch(stream, windows_B[rows], config.sequence_length, data.end_id)

    return iter(
        grain.MapDataset.range(windows)
        .shuffle(seed=_shuffle_seed(config.seed))
        .repeat()
        .batch(config.batch_size, drop_remainder=True)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def validation_batches(data: TokenData, config: DataConfig, limit: int = 0, *,
                       process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """The validation stream in order, every token but the first predicted once.

    Args:
      limit: batches to stop after; 0 reads everything.

    Returns:
      Batches as `train_batches` gives them, and weights_BT float32: 1 where the target counts, 0
      where the last window or batch is filled up (with the pad token).

    Raises:
      UserError: fewer than two tokens to validate on, or the batch does not divide among the
        processes.
    """
    rows = _rows(config, process_index, process_count)
    total = data.validation_tokens
    require(total >= 2, "data.validation_fraction", config.validation_fraction,
            f"leaves {total} tokens of {data.train_tokens + total} to validate on; it needs 2 or "
            "more: raise it or bring more text")
    windows = -(-(total - 1) // config.sequence_length)
    batches = -(-windows // config.batch_size)
    batches = min(batches, limit) if limit > 0 else batches
    return (_validation_batch(data, number * config.batch_size + rows, config.sequence_length)
            for number in range(batches))


def _rows(config: DataConfig, process_index: int, process_count: int) -> np.ndarray:
    """The rows of a whole batch that this process reads, int [B]."""
    assert 0 <= process_index < process_count
    require(config.batch_size % process_count == 0, "data.batch_size", config.batch_size,
            f"does not divide among {process_count} processes")
    share = config.batch_size // process_count
    return process_index * share + np.arange(share)


def _whole_windows(data: TokenData, config: DataConfig) -> int:
    windows = max(data.train_tokens - 1, 0) // config.sequence_length
    require(windows >= 1, "data.sequence_length", config.sequence_length,
            f"is too long for {data.train_tokens} tokens of training text; a sequence needs one "
            "token more than its length")
    require(windows >= config.batch_size, "data.batch_size", config.batch_size,
            f"is more than the {windows} sequences of data.sequence_length = "
            f"{config.sequence_length} in {data.train_tokens} tokens of training text")
    if windows >= 2**32:
        raise UserError(f"data.sequence_length = {config.sequence_length}: makes {windows} "
                        "sequences of this text; at most 2**32 - 1 can be shuffled")
    return windows


def _shuffle_seed(seed: int) -> int:
    """Grain adds the epoch's number to its seed; mixing keeps near-by seeds apart."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _train_batch(stream: TokenStream, windows_B: np.ndarray, length: int, end_id: int) -> Batch:
    read = [stream.read(window * length, (window + 1) * length + 1)
            for window in windows_B.tolist()]
    return _split_windows(stream, windows_B, np.stack(read), end_id)


def _split_windows(stream: TokenStream, windows_B: np.ndarray, window_BT: np.ndarray,
                   end_id: int) -> Batch:
    """Windows of T + 1 tokens as tokens, targets and starts."""
    tokens_BT, targets_BT = window_BT[:, :-1].copy(), window_BT[:, 1:].copy()
    starts_BT = np.zeros(tokens_BT.shape, bool)
    starts_BT[:, 1:] = tokens_BT[:, :-1] == end_id
    length = tokens_BT.shape[1]
    starts_BT[:, 0] = [_starts_at(stream, window * length, end_id) for window in windows_B.tolist()]
    return {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "starts_BT": starts_BT}


def _starts_at(stream: TokenStream, token: int, end_id: int) -> bool:
    return token == 0 or bool(stream.read(token - 1, token) == end_id)


def _validation_batch(data: TokenData, windows_B: np.ndarray, length: int) -> Batch:
    """Windows of the validation stream, those behind its end all padding."""
    total = data.validation_tokens
    window_BT = np.full((len(windows_B), length + 1), data.pad_id, np.int32)
    filled_B = np.clip(total - windows_B * length, 0, length + 1)
    filled_B[filled_B == 1] = 0  # a token without a target
    for row, (window, filled) in enumerate(zip(windows_B.tolist(), filled_B.tolist(), strict=True)):
        window_BT[row, :filled] = data.validation.read(window * length, window * length + filled)
    batch: dict[str, Any] = _split_windows(
        data.validation, np.minimum(windows_B, (total - 1) // length), window_BT, data.end_id)
    real_BT = np.arange(length) < np.maximum(filled_B - 1, 0)[:, None]
    batch["starts_BT"] &= np.arange(length) < filled_B[:, None]
    return {**batch, "weights_BT": real_BT.astype(np.float32)}
