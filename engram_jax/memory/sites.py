"""Which memories a model has, and the row ids that tokens ask of each.

A site is a place in the network that is fed from one table: a block with an Engram module, or the
input embedding under OverEncoding. Shapes: B batch, T time, H = (N - 1) * K rows of a token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import HashConfig, ModelConfig
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.memory import codec
from engram_jax.memory.layout import TableLayout


@dataclasses.dataclass(frozen=True)
class Site:
    """One table: its name in the parameter tree, its hash settings and its layout."""

    name: str
    layer: int
    hash_config: HashConfig
    layout: TableLayout


def engram_site(layer: int) -> str:
    return f"layer_{layer}"


INPUT_SITE = "input"


@functools.lru_cache(maxsize=64)
def sites(model: ModelConfig) -> tuple[Site, ...]:
    """Every memory of the model, in the order in which its rows are needed."""
    found = []
    if (over := model.over_encoding) is not None:
        dim = model.width // over.total_heads
        found.append(_site(INPUT_SITE, 0, over, _hash(over, (0,), model.vocab_size, 0), dim))
    if (engram := model.engram) is not None:
        ngrams = _hash(engram, engram.layers, model.vocab_size, 0)
        found += [_site(engram_site(layer), layer, engram, ngrams, engram.head_dim)
                  for layer in engram.layers]
    return tuple(found)


def _site(name: str, layer: int, config: HashConfig, ngrams: NgramHash, dim: int) -> Site:
    layout = TableLayout(rows=ngrams.table_rows[layer], dim=dim, shards=config.shards)
    return Site(name, layer, config, layout)


def _hash(config: HashConfig, layers: tuple[int, ...], vocab_size: int, pad_id: int) -> NgramHash:
    return NgramHash(rows_per_head=config.rows_per_head, heads=config.heads, layers=layers,
                     vocab_size=vocab_size, pad_id=pad_id, seed=config.hash_seed)


def gather_rows(
    model: ModelConfig, tables: dict[str, jax.Array], ids: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """For each site its rows float32 [B, T, H, C], from tables that lie whole on one device."""
    return {site.name: codec.decode(site.layout.gather(tables[site.name], ids[site.name]))
            for site in sites(model)}


@dataclasses.dataclass(frozen=True)
class Addressing:
    """Tokens to the row ids of every site; pure, so that it runs inside a jitted step.

    Build it with `address`. `hashes` and `vocabularies` are keyed by the site's name.
    """

    hashes: dict[str, NgramHash]
    vocabularies: dict[str, CompressedVocabulary]
    layers: dict[str, int]

    def ids(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Row ids in each site's table, int32 [B, T, H].

        Args:
          tokens_BT: raw token ids, int32.
          positions_BT: position of each token in its document, int32; look-backs then stop at the
            document's start. None lets them cross it.
        """
        out = {}
        for name, ngrams in self.hashes.items():
            lookup = jnp.asarray(self.vocabularies[name].lookup)
            reach_BT = None if positions_BT is None else positions_BT + 1
            canonical_BT = lookup.at[tokens_BT].get(mode="promise_in_bounds")
            out[name] = ngrams.table_ids(canonical_BT, self.layers[name], reach_BT=reach_BT)
        return out

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint must carry: for each site, a digest of its hash and vocabulary."""
        return {name: f"{self.hashes[name].fingerprint}:{self.vocabularies[name].digest}"
                for name in self.hashes}


def address(model: ModelConfig, vocabulary: CompressedVocabulary, pad_id: int) -> Addressing:
    """The addressing of `model` for a tokenizer's vocabulary and raw pad id."""
    raw = CompressedVocabulary.identity(len(vocabulary.lookup))
    hashes, vocabularies, layers = {}, {}, {}
    for site in sites(model):
        chosen = vocabulary if site.hash_config.compress else raw
        canonical_pad = int(np.asarray(chosen.lookup)[pad_id])
        all_layers = model.engram.layers if model.engram and site.name != INPUT_SITE else (0,)
        hashes[site.name] = _hash(site.hash_config, all_layers, chosen.size, canonical_pad)
        vocabularies[site.name] = chosen
        layers[site.name] = site.layer
    return Addressing(hashes, vocabularies, layers)
