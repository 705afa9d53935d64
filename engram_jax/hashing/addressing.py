"""Which memories a model has, and the row ids that tokens ask of each.

A site is a block of the network that is fed from one table, or the input embedding under
OverEncoding. Shapes: B batch, T time, P tokens before a chunk, N - 1 of them that an n-gram looks
back, H = (N - 1) * K rows of a token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig, HashConfig, ModelConfig, require
from engram_jax.hashing import controls
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import BEFORE


@dataclasses.dataclass(frozen=True)
class Site:
    """A block of the network, or its input, and the table that feeds it.

    Attributes:
      name: in the parameter tree.
      layer: of the network.
      layers: all that are hashed in one sequence with it: no two heads of theirs share a prime.
      hash_config: its settings.
      rows, dim: of its table.
    """

    name: str
    layer: int
    layers: tuple[int, ...]
    hash_config: HashConfig
    rows: int
    dim: int


def engram_site(config: EngramConfig, layer: int) -> str:
    """The name of the site that feeds the Engram module of a layer."""
    return f"layer_{config.layers[0] if config.one_table else layer}"


INPUT_SITE = "input"


@functools.lru_cache(maxsize=64)
def sites(config: ModelConfig | EngramConfig) -> tuple[Site, ...]:
    """Every memory of a model, in the order in which its rows are needed.

    Those of an `EngramConfig` alone are its layers', for a network that is not ours.
    """
    if isinstance(config, EngramConfig):
        layers = config.layers[:1] if config.one_table else config.layers
        return tuple(_site(engram_site(config, layer), layer, layers, config, config.head_dim)
                     for layer in layers)
    over = config.over_encoding
    before = () if over is None else (
        _site(INPUT_SITE, 0, (0,), over, config.width // over.total_heads),)
    return before + (() if config.engram is None else sites(config.engram))


def _site(
    name: str, layer: int, layers: tuple[int, ...], config: HashConfig, dim: int
) -> Site:
    # How many rows a table has depends neither on the vocabulary nor on the pad id.
    rows = _hash(config, layers, vocab_size=2, pad_id=0).table_rows[layer]
    return Site(name, layer, layers, config, rows, dim)


def _hash(config: HashConfig, layers: tuple[int, ...], vocab_size: int, pad_id: int) -> NgramHash:
    return NgramHash(rows_per_head=config.rows_per_head, heads=config.heads, layers=layers,
                     vocab_size=vocab_size, pad_id=pad_id, seed=config.hash_seed)


@dataclasses.dataclass(frozen=True)
class Addressing:
    """Hashes tokens to the row ids of every site, under jit or not; `hashing.host` is its twin.

    Made by `address`. `hashes` and `vocabularies` are keyed by the site's name.
    """

    sites: tuple[Site, ...]
    hashes: dict[str, NgramHash]
    vocabularies: dict[str, CompressedVocabulary]

    @functools.cached_property
    def history_length(self) -> int:
        """P, how many tokens before a chunk its n-grams reach."""
        return max((ngrams.max_order - 1 for ngrams in self.hashes.values()), default=0)

    @functools.cached_property
    def layers(self) -> dict[int, str]:
        """Each layer with an Engram module, and the site whose rows it reads."""
        read: dict[int, str] = {}
        for site in self.sites:
            config = site.hash_config
            if isinstance(config, EngramConfig):
                layers = config.layers if config.one_table else (site.layer,)
                read |= dict.fromkeys(layers, site.name)
        return read

    def ids(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
        history_BP: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Hash tokens to the row ids of each site's table, int32 [B, T, H].

        Args:
          tokens_BT: raw token ids, int32.
          positions_BT: position of each token in its document, int32; look-backs then stop at the
            document's start. None lets them cross it.
          history_BP: the raw ids before these, oldest first, at least as many as any look-back;
            `BEFORE` (-1) before the start. None is the start of a sequence.

        Raises:
          UserError: a token that the vocabulary does not have. Inside `jax.jit`, where nothing can
            be raised, its n-grams have the row id -1, at which tables have no row.
        """
        self.check_known(tokens_BT, history_BP)
        out = {}
        for site in self.sites:
            ngrams, vocabulary = self.hashes[site.name], self.vocabularies[site.name]
            reach_BT = None if positions_BT is None else positions_BT + 1
            canonical_BT = vocabulary.canonical(tokens_BT)
            before_BN = None if history_BP is None else _canonical_history(
                history_BP, ngrams, vocabulary)
            if (keys := site.hash_config.keys) != "ngrams":
                assert history_BP is None, "controls only train and evaluate"
                canonical_BT = (controls.of_neighbours(canonical_BT) if keys == "shuffled"
                                else controls.by_chance(canonical_BT, vocabulary.size))
            out[site.name] = ngrams.table_ids(
                canonical_BT, site.layer, history=before_BN, reach_BT=reach_BT)
        return out

    @functools.cached_property
    def vocab_size(self) -> int:
        """How many raw token ids there are; 2**31 where nothing is hashed."""
        return min((len(each.lookup) for each in self.vocabularies.values()), default=2**31)

    def check_known(self, tokens: Any, history: Any = None) -> None:
        """Refuse tokens that the vocabulary does not have, unless they are traced by `jax.jit`.

        Raises:
          UserError: the first of them.
        """
        most = self.vocab_size - 1
        for name, ids, least in (("token id", tokens, 0), ("history", history, BEFORE)):
            for extreme in _extremes(ids):
                require(least <= extreme <= most, name, extreme,
                        f"must be in {least}..{most}, the tokenizer's vocabulary")

    def check_serves(self) -> None:
        """Refuse controls (UserError): what they read depends on more than the n-grams."""
        for site in self.sites:
            require(site.hash_config.keys == "ngrams", f"{site.name}.keys", site.hash_config.keys,
                    "is a control, which only trains and evaluates")

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint must carry: for each site, a digest of its hash and vocabulary."""
        return {name: f"{self.hashes[name].fingerprint}:{self.vocabularies[name].digest}"
                for name in self.hashes}


def address(
    config: ModelConfig | EngramConfig, vocabulary: CompressedVocabulary | None = None,
    pad_id: int | None = None,
) -> Addressing:
    """Make the addressing of a model, or of an Engram alone, for a vocabulary.

    Args:
      config: of the model; or of the memories of a network that is not ours.
      vocabulary: canonical ids of the tokenizer; None hashes raw ids below `config.vocab_size`.
      pad_id: the raw id that stands for positions before the start; None: the config's own.

    Raises:
      UserError: a pad id that the vocabulary does not have, or none where one is needed.
    """
    if vocabulary is None:
        vocabulary = CompressedVocabulary.identity(config.vocab_size)
    if pad_id is None and isinstance(config, EngramConfig):
        pad_id = config.pad_id
    require(pad_id is not None and 0 <= pad_id < vocabulary.lookup.size, "pad_id", pad_id,
            f"must be a raw token id, in 0..{vocabulary.lookup.size - 1}")
    raw = CompressedVocabulary.identity(vocabulary.lookup.size)
    hashes, vocabularies = {}, {}
    for site in sites(config):
        chosen = vocabulary if site.hash_config.compress else raw
        pad = int(chosen.lookup[pad_id])
        hashes[site.name] = _hash(site.hash_config, site.layers, chosen.size, pad)
        vocabularies[site.name] = chosen
    return Addressing(sites(config), hashes, vocabularies)


def _canonical_history(
    history_BP: jax.Array, ngrams: NgramHash, vocabulary: CompressedVocabulary
) -> jax.Array:
    """The canonical ids of the last N - 1 tokens, int32 [B, N - 1]."""
    before = ngrams.max_order - 1
    require(history_BP.ndim == 2 and history_BP.shape[1] >= before, "history.shape",
            history_BP.shape, f"must be [B, {before} or more]")
    raw_BN = history_BP[:, history_BP.shape[1] - before:]
    canonical_BN = vocabulary.canonical(jnp.asarray(raw_BN))
    return jnp.where(raw_BN == BEFORE, jnp.int32(ngrams.pad_id), canonical_BN)


def _extremes(ids: Any) -> tuple[int, ...]:
    """The least and the largest of them; none where they cannot be seen."""
    hidden = isinstance(ids, jax.core.Tracer) or (
        isinstance(ids, jax.Array) and not ids.is_fully_addressable)
    if ids is None or hidden or not np.size(ids):
        return ()
    return int(np.min(ids)), int(np.max(ids))
