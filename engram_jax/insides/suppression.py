"""What a model still knows when its memory is taken away: rows zeroed, losses by kinds of tokens.

Shapes: B batch, T time.
"""

import dataclasses
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from engram_jax.insides.observing import Opened

BANDS = (0, 1, 10, 100, 1000)  # times that an n-gram comes in a text, from ... on
START = "start of a sequence"  # before which there is no n-gram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What tokens of one kind lose without the memory.

    Attributes:
      tokens: how many there were.
      loss, suppressed: their mean loss with memory and without, nats a token.
    """

    tokens: int
    loss: float
    suppressed: float

    @property
    def likelihood_kept(self) -> float:
        """exp(loss - suppressed): the share of the tokens' (geometric mean) probability that is
        left."""
        return float(np.exp(self.loss - self.suppressed))


Kind = Callable[[np.ndarray], np.ndarray]  # tokens [B, T + 1] to a name of each target [B, T]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The losses of a text's targets.

    Attributes:
      batches: raw tokens, int32 [B, T + 1] each.
      losses, without: nats of each target with memory and without, float32 [B, T] for each batch.
    """

    batches: Sequence[np.ndarray]
    losses: Sequence[np.ndarray]
    without: Sequence[np.ndarray]

    def by_kind(self, kind: Kind) -> dict[str, Kept]:
        """Mean losses by kind of target, named for example by `token_classes`."""
        names = [kind(tokens) for tokens in self.batches]
        name_N, loss_N, without_N = (np.concatenate([part.ravel() for part in parts])
                                     for parts in (names, self.losses, self.without))
        return {str(name): Kept(tokens=int(chosen.sum()), loss=float(loss_N[chosen].mean()),
                                suppressed=float(without_N[chosen].mean()))
                for name in dict.fromkeys(sorted(name_N.tolist()))
                for chosen in [name_N == name]}


def measured(opened: Opened, batches: Iterable[np.ndarray]) -> Measured:
    """Losses with all memory rows as they are and with all of them zero.

    Args:
      opened: the run; one without memory loses nothing.
      batches: raw tokens, int32 [B, T + 1] each; every token but the first is a target.
    """
    kept = list(batches)
    return Measured(kept, [token_losses(opened, tokens) for tokens in kept],
                    [token_losses(opened, tokens, scale=0.0) for tokens in kept])


def token_losses(opened: Opened, tokens: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Nats of each target, float32 [B, T], with memory's rows times `scale`."""
    seen = opened.observe(tokens[:, :-1], scale)
    return np.asarray(opened.losses(seen.streams[-1], tokens[:, 1:]))


def token_classes(opened: Opened) -> Kind:
    """Targets by what they are: the beginning of a word, its rest, digits, punctuation, space."""
    vocabulary = range(opened.reader.vocab_size)
    tokenizer = opened.reader.tokenizer
    texts = tokenizer.decode_batch([[i] for i in vocabulary], skip_special_tokens=False)
    # SentencePiece's space, which decoding leaves out at the beginning of a text.
    spaced = [(tokenizer.id_to_token(i) or "").startswith("\u2581") for i in vocabulary]
    class_V = np.array([_class(f" {text.lstrip()}" if space else text)
                        for text, space in zip(texts, spaced, strict=True)])
    return lambda tokens: class_V[tokens[:, 1:]]


def _class(text: str) -> str:
    inner = text.strip()
    if not inner:
        return "space"
    if inner[0].isdigit():
        return "digits"
    if unicodedata.category(inner[0])[0] in "PS":
        return "punctuation"
    return "beginning of a word" if text[0].isspace() else "rest of a word"


def frequency_bands(
    counts: Mapping[tuple[int, ...], int], order: int, bands: Sequence[int] = BANDS
) -> Kind:
    """Targets by how often the n-gram before them, which memory was asked for, comes in a text.

    Args:
      counts: of n-grams of raw tokens, as `ngram_counts` gives them.
      order: tokens of an n-gram.
      bands: ascending; each goes up to the next. The first order - 1 targets of a sequence are in
        none but in `START`.
    """
    def kind(tokens: np.ndarray) -> np.ndarray:
        inputs = np.pad(tokens[:, :-1], ((0, 0), (order - 1, 0)), constant_values=-1)
        windows = np.lib.stride_tricks.sliding_window_view(inputs, order, axis=1)
        times = np.array([[counts.get(tuple(ngram), 0) for ngram in row]
                          for row in windows.tolist()])
        names = np.array([*(f"{low:>5,}+" for low in bands), START])
        band = np.searchsorted(bands, times, side="right") - 1
        band[:, : order - 1] = len(bands)
        return names[band]

    return kind


def context(tokens: np.ndarray) -> np.ndarray:
    """Targets by whether their trigram, two tokens and the target, stood in the sequence before.

    What stood there can be read; what is new has to be remembered.
    """
    seen = np.zeros(tokens[:, 1:].shape, bool)
    for row_T, seen_T in zip(tokens, seen, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(row_T, 3)
        _, first, same = np.unique(windows, axis=0, return_index=True, return_inverse=True)
        seen_T[1:] = first[same.reshape(-1)] < np.arange(len(windows))
    return np.where(seen, "seen in the context", "new in the context")


def ngram_counts(tokens_N: np.ndarray, order: int) -> dict[tuple[int, ...], int]:
    """How often each n-gram of raw tokens comes in a text."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens_N, order)
    ngrams, times = np.unique(windows, axis=0, return_counts=True)
    return dict(zip(map(tuple, ngrams.tolist()), times.tolist(), strict=True))
