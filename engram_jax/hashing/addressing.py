"""Which memories a model has, and the row ids that tokens ask of each.

A site is a place in the network that is fed from one table: a block with an Engram module, or the
input embedding under OverEncoding. Shapes: B batch, T time, H = (N - 1) * K rows of a token.
"""

import dataclasses
import functools

import jax
import numpy as np

from engram_jax.config import EngramConfig, HashConfig, ModelConfig, require
from engram_jax.hashing import controls
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash


@dataclasses.dataclass(frozen=True)
class Site:
    """One table.

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
    """The site that feeds the Engram module of a layer."""
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
    """Tokens to the row ids of every site; pure, so that it runs inside a jitted step.

    Build it with `address`. `hashes` and `vocabularies` are keyed by the site's name.
    """

    sites: tuple[Site, ...]
    hashes: dict[str, NgramHash]
    vocabularies: dict[str, CompressedVocabulary]

    def ids(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
        history_BP: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Row ids in each site's table, int32 [B, T, H].

        Args:
          tokens_BT: raw token ids, int32.
          positions_BT: position of each token in its document, int32; look-backs then stop at the
            document's start. None lets them cross it.
          history_BP: the raw ids before these, oldest first, at least as many as any look-back;
            None is the start of a sequence.
        """
        out = {}
        for site in self.sites:
            ngrams, vocabulary = self.hashes[site.name], self.vocabularies[site.name]
            reach_BT = None if positions_BT is None else positions_BT + 1
            before_BN = None if history_BP is None else vocabulary.canonical(
                history_BP[:, history_BP.shape[1] - ngrams.max_order + 1:])
            canonical_BT = vocabulary.canonical(tokens_BT)
            if (keys := site.hash_config.keys) != "ngrams":
                assert history_BP is None, "controls only train and evaluate"
                canonical_BT = (controls.of_neighbours(canonical_BT) if keys == "shuffled"
                                else controls.by_chance(canonical_BT, vocabulary.size))
            out[site.name] = ngrams.table_ids(
                canonical_BT, site.layer, history=before_BN, reach_BT=reach_BT)
        return out

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
    config: ModelConfig | EngramConfig, vocabulary: CompressedVocabulary, pad_id: int
) -> Addressing:
    """The addressing of a model, or of an Engram alone, for a vocabulary and a raw pad id."""
    raw = CompressedVocabulary.identity(len(vocabulary.lookup))
    hashes, vocabularies = {}, {}
    for site in sites(config):
        chosen = vocabulary if site.hash_config.compress else raw
        pad = int(np.asarray(chosen.lookup)[pad_id])
        hashes[site.name] = _hash(site.hash_config, site.layers, chosen.size, pad)
        vocabularies[site.name] = chosen
    return Addressing(sites(config), hashes, vocabularies)
