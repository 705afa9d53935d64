"""`engram-jax analyze`: every analysis of trained runs, by name, its findings as plain values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from engram_jax.config import require
from engram_jax.data.reading import read_file
from engram_jax.errors import UserError
from engram_jax.insides import cka as similarity
from engram_jax.insides import gates, memory_use, spans, suppression, tasks
from engram_jax.insides.examples import GATED
from engram_jax.insides.logit_lens import logit_lens
from engram_jax.insides.observing import Opened, open_run
from engram_jax.insides.patchscope import patchscope
from engram_jax.insides.texts import Text, validation_text
from engram_jax.insides.token_classes import compression
from engram_jax.runs.directory import RunDirectory
from engram_jax.storage import refusals, write_text
from engram_jax.tables.layout import layout_of

CKA_EXAMPLES = 256  # positions of a minibatch of CKA
MOST_EXAMPLES = 8 * CKA_EXAMPLES  # of all its minibatches
GATE_TOKENS = 400  # of the text whose gates are told one by one
FREQUENT = 3  # order of the n-grams whose frequency is told


def of_gates(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """Gates of the text's first tokens; of each layer the n-grams that open and shut it most, and
    how much each branch follows pattern completion."""
    return {opened.name: _gates(opened, text) for opened in runs}


def _gates(opened: Opened, text: str) -> dict[str, Any]:
    gates.require_memory(opened)
    read = Text(opened, text)
    known = [sentence for sentence in GATED if opened.tokens(sentence).size]  # of its characters
    observed, *sentences = gates.of_texts(opened, [_beginning(opened, text), *known])
    layers, branches = {}, {}
    for layer, gate_TM in observed.gates.items():
        extremes = gates.extremes(opened, read.inputs(), layer)
        follows_M = gates.pattern_branch(opened, read.inputs(), layer)
        layers[layer] = {
            "gates": gate_TM.tolist(), "highest": extremes.highest, "lowest": extremes.lowest,
            "pattern_correlation": follows_M.tolist()}
        branches[layer] = int(follows_M.argmax())
    return {"pieces": observed.pieces, "layers": layers, "pattern_branch": branches,
            "examples": [
                {"text": text, "pieces": sentence.pieces,
                 "layers": {layer: gate_TM.tolist() for layer, gate_TM in sentence.gates.items()}}
                for text, sentence in zip(known, sentences, strict=True)]}


def _beginning(opened: Opened, text: str) -> str:
    ends = opened.encoded(text).offsets[:GATE_TOKENS]
    return text[: ends[-1][1]] if ends else ""


def of_lens(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """KL from the last layer's prediction to each layer's, nats."""
    return {opened.name: logit_lens(opened, Text(opened, text).inputs()).tolist()
            for opened in runs}


def of_cka(
    runs: Sequence[Opened], text: str, marked: spans.Marked | None = None
) -> dict[str, Any]:
    """CKA of every layer of the first run with every layer of each other (or itself), at the last
    tokens of spans, and the soft alignment.

    Args:
      runs: the first, and others with its tokenizer.
      text: that they read.
      marked: spans of the text; None are the names in it that have two or more tokens.
    """
    first, *others = runs
    read = Text(first, text)
    positions, tokens_S2 = _spans(read, marked)
    batches = list(read.ends(tokens_S2, MOST_EXAMPLES))
    examples = sum(len(places_P) for _, places_P in batches)
    require(examples >= similarity.LEAST, "examples", examples,
            f"must be at least {similarity.LEAST}, the {positions} that lie in whole sequences")
    compared = {}
    for other in others or [first]:
        require(other.reader.tokenizer.to_str() == first.reader.tokenizer.to_str(), "run",
                other.name, f"has another tokenizer than {first.name}, so their positions are of "
                "different tokens")
        matrix = _likeness(first, other, batches)
        compared[other.name] = {"cka": matrix.tolist(),
                             "soft_alignment": similarity.soft_alignment(matrix).tolist()}
    return {"of": first.name, "positions": positions, "examples": examples, "with": compared}


def _spans(read: Text, marked: spans.Marked | None) -> tuple[str, np.ndarray]:
    """What is compared, in words, and first and last tokens, [S, 2]."""
    if marked is not None:
        return (f"last tokens of {len(marked.spans):,} {marked.kind}",
                spans.tokens_of(marked.spans, read.offsets_N2))
    tokens_S2 = spans.tokens_of(spans.names(read.text), read.offsets_N2)
    tokens_S2 = tokens_S2[tokens_S2[:, 0] < tokens_S2[:, 1]]
    require(len(tokens_S2) > 0, "text", read.text[:spans.SHOWN],
            "has no names of two or more tokens; --spans FILE chooses other positions")
    return f"last tokens of {len(tokens_S2):,} names of two or more tokens in the text", tokens_S2


def _likeness(
    first: Opened, other: Opened, batches: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """CKA [L, L'] over minibatches that are drawn from all positions by a fixed seed."""
    ours, theirs = (np.concatenate([_at(opened, *batch) for batch in batches], axis=1)
                    for opened in (first, other))
    alike = similarity.Similarity.between(len(ours), len(theirs))
    order = np.random.default_rng(0).permutation(ours.shape[1])
    for part in np.array_split(order, -(-len(order) // CKA_EXAMPLES)):
        alike.add(ours[:, part], theirs[:, part])
    return alike.cka()


def _at(opened: Opened, tokens_BT: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Each layer's merged streams at some positions, [L, P, D]."""
    return np.stack([np.asarray(x_BTMD.mean(axis=2)).reshape(tokens_BT.size, -1)[positions]
                     for x_BTMD in opened.observe(tokens_BT).streams[1:]])


def of_suppression(
    runs: Sequence[Opened], text: str, examples: Sequence[tasks.Example] = ()
) -> dict[str, Any]:
    """Losses with memory and without, by class of token, by how frequent the n-gram is in the text
    itself and by whether the sequence showed it before; by task, if there are examples."""
    return {opened.name: _suppression(opened, Text(opened, text), examples) for opened in runs}


def _suppression(
    opened: Opened, read: Text, examples: Sequence[tasks.Example]
) -> dict[str, Any]:
    counts = suppression.ngram_counts(read.tokens_N, FREQUENT)
    kinds = {"classes": suppression.token_classes(opened),
             "ngram_frequency": suppression.frequency_bands(counts, FREQUENT),
             "context": suppression.context}
    measured = suppression.measured(opened, read.batches())
    losses = {name: _plain(measured.by_kind(of_kind)) for name, of_kind in kinds.items()}
    return {**losses, "tasks": _plain(tasks.answered(opened, examples))} if examples else losses


def _plain(kinds: Mapping[str, suppression.Kept]) -> dict[str, dict[str, Any]]:
    return {name: {**vars(kept), "likelihood_kept": kept.likelihood_kept}
            for name, kept in kinds.items()}


def of_patchscope(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """What each run says of its state behind the text's last token, layer by layer."""
    return {opened.name: patchscope(opened, text) for opened in runs}


def of_tokenizer(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """What compression merges; the text is not read."""
    del text
    compressions = {opened.name: compression(opened.reader.tokenizer) for opened in runs}
    return {name: {**each._asdict(), "reduction": each.reduction}
            for name, each in compressions.items()}


def of_memory(runs: Sequence[Opened], text: str) -> dict[str, Any]:
    """Rows touched, collisions, reads by rank, cache hits by size, rows' norms by reads."""
    return {opened.name: _memory(opened, Text(opened, text)) for opened in runs}


def _memory(opened: Opened, read: Text) -> dict[str, Any]:
    tokens_BT = np.concatenate(list(read.inputs()))
    tables = {}
    for name, ids_BTH in opened.reader.addressing.ids(jnp.asarray(tokens_BT)).items():
        site = next(site for site in opened.reader.addressing.sites if site.name == name)
        ids_NH = np.asarray(ids_BTH).reshape(tokens_BT.size, -1)
        counts_R = memory_use.access_counts(ids_NH, site.rows)
        table_RC = np.asarray(layout_of(site).gather(
            opened.state.tables[name], jnp.arange(site.rows)), np.float64)
        tables[name] = {
            "orders": _orders(opened, name, tokens_BT, ids_NH),
            "reads_by_rank": memory_use.zipf(counts_R).tolist(),
            "norm_by_reads": memory_use.norms_by_count(table_RC, counts_R)}
    return tables


def _orders(
    opened: Opened, site: str, tokens_BT: np.ndarray, ids_NH: np.ndarray
) -> dict[int, dict[str, Any]]:
    """How the rows of each n-gram order are used: occupancy, collisions and the cache curve."""
    hashing = opened.reader.addressing.hashes[site]
    layer = next(each.layer for each in opened.reader.addressing.sites if each.name == site)
    orders = {}
    for number, primes in enumerate(hashing.primes[layer]):
        order = number + 2
        ids_NK = ids_NH[:, number * hashing.heads : (number + 1) * hashing.heads]
        ngrams_N = _ngram_numbers(opened, site, tokens_BT, order)
        sizes = [2**power for power in range(4, max(5, int(np.log2(len(ngrams_N))) + 1))]
        orders[order] = {
            **memory_use.occupancy(ids_NK, ngrams_N, sum(primes))._asdict(),
            "foreign_reads_by_frequency": memory_use.collisions_by_frequency(ids_NK, ngrams_N),
            "cache_entries": sizes,
            "cache_hit_rates": memory_use.lru_hit_rates(ngrams_N, sizes)}
    return orders


def _ngram_numbers(
    opened: Opened, site: str, tokens_BT: np.ndarray, order: int
) -> np.ndarray:
    """A number for the n-gram of canonical ids at each position, int64 [B * T]."""
    canonical = opened.reader.addressing.vocabularies[site].lookup[tokens_BT]
    padded = np.pad(canonical, ((0, 0), (order - 1, 0)), constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, order, axis=1)
    return np.unique(windows.reshape(-1, order), axis=0, return_inverse=True)[1].reshape(-1)


ANALYSES: dict[str, Callable[..., dict[str, Any]]] = {
    "gates": of_gates,
    "lens": of_lens,
    "cka": of_cka,
    "suppression": of_suppression,
    "patchscope": of_patchscope,
    "tokenizer": of_tokenizer,
    "memory": of_memory,
}


def analyze(
    what: str, directories: Sequence[epath.PathLike], file: epath.PathLike | None = None,
    spans_file: epath.PathLike | None = None, tasks_file: epath.PathLike | None = None,
    mesh: str | None = None,
) -> dict[str, Any]:
    """One analysis of trained runs.

    Args:
      what: of `ANALYSES`.
      directories: of the runs.
      file: the text that they read, UTF-8; None is the first run's validation text.
      spans_file: of "cka", the spans whose last tokens are compared, as `spans` reads them; None
        are names in the text.
      tasks_file: of "suppression", prompts and answers, as `tasks` reads them.
      mesh: of each run, as `serving_mesh` takes it.

    Raises:
      UserError: no run or checkpoint, two runs of one name, no text, a file that the analysis does
        not take, or as the analysis.
      MachineError: something cannot be read.
    """
    for option, given, takes in (("spans", spans_file, "cka"), ("tasks", tasks_file,
                                                                "suppression")):
        if given is not None and what != takes:
            raise UserError(f"--{option} is of analyze {takes}, not of analyze {what}")
    text = None if file is None else read_file(file, "text")
    options: dict[str, Any] = {}
    if spans_file is not None:
        text, options["marked"] = _marked(read_file(spans_file, "spans"), text)
    if tasks_file is not None:
        options["examples"] = tasks.parsed(read_file(tasks_file, "tasks"))
    runs = [open_run(RunDirectory(directory), mesh) for directory in directories]
    names = [opened.name for opened in runs]
    require(len(set(names)) == len(names), "run", names, "must have different names to be told "
            "apart")
    return ANALYSES[what](runs, validation_text(runs[0]) if text is None else text, **options)


def _marked(content: str, text: str | None) -> tuple[str, spans.Marked]:
    """The text and its spans, by what a file of spans holds."""
    if spans.is_few_nerd(content):
        if text is not None:
            raise UserError("--text: a file in Few-NERD's format brings its own text; leave one "
                            "of --text and --spans out")
        return spans.few_nerd(content)
    if text is None:
        raise UserError("--spans: a file of `start end` needs --text, the text that they are of")
    return text, spans.listed(content, len(text))


def write(text: str, what: str, folder: epath.PathLike) -> None:
    """Write findings to FOLDER/WHAT.json."""
    path = epath.Path(folder)
    with refusals(path, "written"):
        path.mkdir(parents=True, exist_ok=True)
    write_text(path / f"{what}.json", text + "\n")
