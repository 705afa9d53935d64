"""`engram-jax analyze`: every analysis of trained runs, by name, its findings as plain values."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from engram_jax.analysis import cka as similarity
from engram_jax.analysis import gates, memory_use, suppression
from engram_jax.analysis.logit_lens import logit_lens
from engram_jax.analysis.observing import Opened, open_run
from engram_jax.analysis.patchscope import patchscope
from engram_jax.analysis.token_classes import compression
from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.storage import refusals, write_text
from engram_jax.training.inputs import open_inputs
from engram_jax.training.records import RunDirectory

BATCHES = 8  # of the text that an analysis reads
CKA_EXAMPLES = 256  # positions of a batch of CKA
GATE_TOKENS = 400  # of the text whose gates are told one by one
FREQUENT = 3  # order of the n-grams whose frequency is told


class Text:
    """A text as a run reads it, in batches of the run's shape.

    Raises:
      UserError: it is shorter than one sequence.
    """

    def __init__(self, opened: Opened, text: str):
        data = opened.run.data
        self.text, self.tokens_N = text, opened.tokens(text)
        self._length = data.sequence_length + 1
        count = self.tokens_N.size // self._length
        require(count >= 1, "text", f"{self.tokens_N.size} tokens",
                f"must have at least {self._length}, one sequence of {opened.name}")
        self._size = min(data.batch_size, count)

    def batches(self, count: int = BATCHES) -> Iterator[np.ndarray]:
        """Tokens [B, T + 1], whole batches from the start of the text."""
        whole = self.tokens_N.size // (self._length * self._size)
        for number in range(min(count, whole)):
            start = number * self._length * self._size
            part = self.tokens_N[start : start + self._length * self._size]
            yield part.reshape(self._size, self._length)

    def inputs(self) -> Iterator[np.ndarray]:
        """The same without the last token of each sequence."""
        return (tokens[:, :-1] for tokens in self.batches())


def of_gates(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """Gates of the text's first tokens; of each layer the n-grams that open and shut it most, and
    how much each branch follows pattern completion."""
    return {opened.name: _gates(opened, text) for opened in runs}


def _gates(opened: Opened, text: str) -> dict[str, Any]:
    gates.require_memory(opened)
    found, read = gates.of_text(opened, _beginning(opened, text)), Text(opened, text)
    layers = {}
    for layer, gate_TM in found.gates.items():
        extremes = gates.extremes(opened, read.inputs(), layer)
        layers[layer] = {
            "gates": gate_TM.tolist(), "highest": extremes.highest, "lowest": extremes.lowest,
            "pattern_correlation": gates.pattern_branch(opened, read.inputs(), layer).tolist()}
    return {"pieces": found.pieces, "layers": layers}


def _beginning(opened: Opened, text: str) -> str:
    ends = opened.reader.tokenizer.encode(text).offsets[:GATE_TOKENS]
    return text[: ends[-1][1]] if ends else ""


def of_lens(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """KL from the last layer's prediction to each layer's, nats."""
    return {opened.name: logit_lens(opened, Text(opened, text).inputs()).tolist()
            for opened in runs}


def of_cka(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """CKA of every layer of the first run with every layer of each other (or itself), at positions
    drawn by a fixed seed, and the soft alignment."""
    first, *others = runs
    found = {}
    for other in others or [first]:
        require(other.reader.tokenizer.to_str() == first.reader.tokenizer.to_str(), "run",
                other.name, f"has another tokenizer than {first.name}, so their positions are of "
                "different tokens")
        alike = similarity.Similarity.between(first.run.model.depth, other.run.model.depth)
        draw = np.random.default_rng(0)
        for tokens_BT in Text(first, text).inputs():
            size = min(CKA_EXAMPLES, tokens_BT.size)
            places = draw.choice(tokens_BT.size, size, replace=False)
            alike.add(*(_at(opened, tokens_BT, places) for opened in (first, other)))
        matrix = alike.cka()
        found[other.name] = {"cka": matrix.tolist(),
                             "soft_alignment": similarity.soft_alignment(matrix).tolist()}
    return {"of": first.name, "with": found}


def _at(opened: Opened, tokens_BT: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Each layer's merged streams at some positions, [L, N, D]."""
    return np.stack([np.asarray(x_BTMD.mean(axis=2)).reshape(tokens_BT.size, -1)[places]
                     for x_BTMD in opened.observe(tokens_BT).streams[1:]])


def of_suppression(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """Losses with memory and without, by class of token and by how frequent the n-gram is in the
    text itself."""
    return {opened.name: _suppression(opened, Text(opened, text)) for opened in runs}


def _suppression(opened: Opened, read: Text) -> dict[str, Any]:
    counts = suppression.ngram_counts(read.tokens_N, FREQUENT)
    kinds = {"classes": suppression.token_classes(opened),
             "ngram_frequency": suppression.frequency_bands(counts, FREQUENT)}
    return {name: {kind: {**vars(kept), "likelihood_kept": kept.likelihood_kept}
                   for kind, kept in suppression.suppression(
                       opened, read.batches(), of_kind).items()}
            for name, of_kind in kinds.items()}


def of_patchscope(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """What each run says of its state behind the text's last token, layer by layer."""
    return {opened.name: patchscope(opened, text) for opened in runs}


def of_tokenizer(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """What compression merges; the text is not read."""
    del text
    found = {opened.name: compression(opened.reader.tokenizer) for opened in runs}
    return {name: {**each._asdict(), "reduction": each.reduction} for name, each in found.items()}


def of_memory(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """Rows touched, collisions, reads by rank, cache hits by size, rows' norms by reads."""
    return {opened.name: _memory(opened, Text(opened, text)) for opened in runs}


def _memory(opened: Opened, read: Text) -> dict[str, Any]:
    tokens_BT = np.concatenate(list(read.inputs()))
    tables = {}
    for name, ids_BTH in opened.reader.addressing.ids(jnp.asarray(tokens_BT)).items():
        site = next(site for site in opened.reader.addressing.sites if site.name == name)
        ids_NH = np.asarray(ids_BTH).reshape(tokens_BT.size, -1)
        counts_R = memory_use.access_counts(ids_NH, site.layout.rows)
        table_RC = np.asarray(site.layout.gather(
            opened.state.tables[name], jnp.arange(site.layout.rows)), np.float64)
        tables[name] = {
            "orders": _orders(opened, name, tokens_BT, ids_NH),
            "reads_by_rank": memory_use.zipf(counts_R).tolist(),
            "norm_by_reads": memory_use.norms_by_count(table_RC, counts_R)}
    return tables


def _orders(
    opened: Opened, site: str, tokens_BT: np.ndarray, ids_NH: np.ndarray
) -> dict[int, dict[str, Any]]:
    """Of each order: occupancy, collisions and the cache curve."""
    hashing = opened.reader.addressing.hashes[site]
    layer = next(each.layer for each in opened.reader.addressing.sites if each.name == site)
    found = {}
    for number, primes in enumerate(hashing.primes[layer]):
        order = number + 2
        ids_NK = ids_NH[:, number * hashing.heads : (number + 1) * hashing.heads]
        ngrams_N = _ngram_numbers(opened, site, tokens_BT, order)
        sizes = [2**power for power in range(4, max(5, int(np.log2(len(ngrams_N))) + 1))]
        found[order] = {
            **memory_use.occupancy(ids_NK, ngrams_N, sum(primes))._asdict(),
            "foreign_reads_by_frequency": memory_use.collisions_by_frequency(ids_NK, ngrams_N),
            "cache_entries": sizes,
            "cache_hit_rates": memory_use.lru_hit_rates(ngrams_N, sizes)}
    return found


def _ngram_numbers(
    opened: Opened, site: str, tokens_BT: np.ndarray, order: int
) -> np.ndarray:
    """A number for the n-gram of canonical ids at each position, int64 [B * T]."""
    canonical = opened.reader.addressing.vocabularies[site].lookup[tokens_BT]
    padded = np.pad(canonical, ((0, 0), (order - 1, 0)), constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, order, axis=1)
    return np.unique(windows.reshape(-1, order), axis=0, return_inverse=True)[1].reshape(-1)


ANALYSES: dict[str, Callable[[Sequence[Opened], str], dict[str, Any]]] = {
    "gates": of_gates,
    "lens": of_lens,
    "cka": of_cka,
    "suppression": of_suppression,
    "patchscope": of_patchscope,
    "tokenizer": of_tokenizer,
    "memory": of_memory,
}


def analyze(
    what: str, directories: Sequence[epath.PathLike], file: epath.PathLike | None = None
) -> dict[str, Any]:
    """One analysis of trained runs.

    Args:
      what: of `ANALYSES`.
      directories: of the runs.
      file: the text that they read, UTF-8; None is the first run's validation text.

    Raises:
      UserError: no run or checkpoint, two runs of one name, no text, or as the analysis.
      MachineError: something cannot be read.
    """
    runs = [open_run(RunDirectory(directory)) for directory in directories]
    names = [opened.name for opened in runs]
    require(len(set(names)) == len(names), "run", names, "must have different names to be told "
            "apart")
    return ANALYSES[what](runs, text_of(runs[0], file))


def text_of(opened: Opened, file: epath.PathLike | None = None) -> str:
    """What runs are to read: a file, or else the validation text of one of them.

    Raises:
      UserError: no such file, or the run's text is not there any more.
      MachineError: it cannot be read.
    """
    return _validation_text(opened) if file is None else _read(file)


def _read(file: epath.PathLike) -> str:
    place = epath.Path(file)
    require(place.is_file(), "text", os.fspath(file), "must be a text file")
    with refusals(place, "read"):
        try:
            return place.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"text = {os.fspath(file)!r}: is not UTF-8 ({error.reason} at byte "
                            f"{error.start})") from error


def _validation_text(opened: Opened) -> str:
    run, tokenizer = opened.run, opened.reader.tokenizer
    stream = open_inputs(run).tokens.validation
    batch = run.data.batch_size * (run.data.sequence_length + 1)
    tokens_N = stream.read(0, min(len(stream), 2 * BATCHES * batch))
    text: str = tokenizer.decode(tokens_N.tolist())
    return text


def write(text: str, what: str, folder: epath.PathLike) -> None:
    """Write findings to FOLDER/WHAT.json."""
    place = epath.Path(folder)
    with refusals(place, "written"):
        place.mkdir(parents=True, exist_ok=True)
    write_text(place / f"{what}.json", text + "\n")
