"""What a run hashes with, as a file: read back, and not derived anew by whatever is installed.

The file is JSON: `format`, `version`, a `digest` of all the rest, and for each memory its sites
with their layers, the variant, multipliers, primes, rows, token map, pad and document rule. Numbers
have 64 bits; a token map is base64 of little-endian int32, one canonical id for each raw id.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from engram_jax.config import EngramConfig, ModelConfig, require
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import Addressing, sites
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.ngrams import NgramHash
from engram_jax.hashing.token_hash import TokenHash
from engram_jax.hashing.variants import HashNumbers
from engram_jax.storage import refusals, write_text

FORMAT, VERSION = "engram_jax hash", 1
FILE = "hash.json"
_WHOLE = ("layers", "rows_per_head", "dead_ids")  # lists of whole numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashArtifact:
    """Everything that row ids depend on.

    Attributes:
      memories: the name of a site to what hashes for it.
      layers: the name of a site to its layer.
    """

    memories: Mapping[str, TokenHash]
    layers: Mapping[str, int]

    @classmethod
    def of(cls, addressing: Addressing) -> "HashArtifact":
        """What a model hashes with now."""
        return cls(
            memories={site.name: TokenHash(hashing=addressing.hashes[site.name],
                                           vocabulary=addressing.vocabularies[site.name])
                      for site in addressing.sites},
            layers={site.name: site.layer for site in addressing.sites})

    def addressing(self, config: ModelConfig | EngramConfig) -> Addressing:
        """The addressing of a model, with these numbers and not with its own.

        Raises:
          UserError: the model has other sites, or tables of another size.
        """
        own = {site.name: (site.layer, site.rows, site.hash_config.heads,
                           site.hash_config.hash_seed) for site in sites(config)}
        kept = {}
        for name, layer in self.layers.items():
            hashing = self.memories[name].hashing
            kept[name] = layer, hashing.table_rows[layer], hashing.heads, hashing.seed
        for name in sorted(own.keys() | kept.keys()):
            require(own.get(name) == kept.get(name), f"{FILE}: memory {name!r}", kept.get(name),
                    f"as (layer, rows, heads, seed); the model has {own.get(name)}")
        return Addressing(
            sites(config), {name: self.memories[name].hashing for name in own},
            {name: self.memories[name].vocabulary for name in own})

    @property
    def digest(self) -> str:
        """sha256 (hex) of the contents."""
        return _digest(self._contents())

    def to_json(self) -> str:
        """The text of the file."""
        head = {"format": FORMAT, "version": VERSION, "digest": self.digest}
        return json.dumps({**head, **self._contents()}, indent=1) + "\n"

    def write(self, path: epath.PathLike) -> None:
        """Write the file; it appears whole.

        Raises:
          MachineError: it cannot be written.
        """
        write_text(epath.Path(path), self.to_json())

    def _contents(self) -> dict[str, Any]:
        groups: dict[TokenHash, dict[str, int]] = {}
        for name, memory in self.memories.items():
            groups.setdefault(memory, {})[name] = self.layers[name]
        return {"memories": [_to_values(memory, named) for memory, named in groups.items()]}


def read_artifact(path: epath.PathLike) -> HashArtifact:
    """Read and check the file of a hash.

    Raises:
      UserError: it is no such file, of another version, altered, or a field is wrong.
      MachineError: it cannot be read.
    """
    with refusals(path, "read"):
        data = epath.Path(path).read_bytes()
    try:
        return parse(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse(data: bytes | str) -> HashArtifact:
    """The artifact of a file's text.

    Raises:
      UserError: the first field that is wrong.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:  # bytes that are no text, too
        raise UserError(f"is not JSON ({error})") from error
    require(isinstance(values, dict) and values.get("format") == FORMAT, "format",
            values.get("format") if isinstance(values, dict) else None, f"must be {FORMAT!r}")
    require(values.get("version") == VERSION, "version", values.get("version"),
            f"of the format; this reads {VERSION}")
    contents = {name: value for name, value in values.items()
                if name not in ("format", "version", "digest")}
    require(values.get("digest") == _digest(contents), "digest", values.get("digest"),
            "is not that of the contents: the file is altered")
    require(list(contents) == ["memories"] and isinstance(contents["memories"], list), "memories",
            list(contents), "must be a list, and all there is")
    memories, layers = {}, {}
    for number, fields in enumerate(contents["memories"]):
        try:
            memory, named = _from_values(fields)
        except UserError as error:
            raise UserError(f"memories[{number}].{error}") from error
        for name in named:
            require(name not in memories, f"memories[{number}].sites", name,
                    "is a site of another memory, too")
        memories.update(dict.fromkeys(named, memory))
        layers.update(named)
    return HashArtifact(memories=memories, layers=layers)


def _digest(contents: Mapping[str, Any]) -> str:
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _to_values(memory: TokenHash, named: Mapping[str, int]) -> dict[str, Any]:
    hashing, lookup_V = memory.hashing, memory.vocabulary.lookup
    return {
        "sites": dict(named), "variant": hashing.variant, "layers": list(hashing.layers),
        "rows_per_head": list(hashing.rows_per_head), "heads": hashing.heads,
        "seed": hashing.seed, "vocab_size": hashing.vocab_size, "pad_id": hashing.pad_id,
        "end_id": memory.end_id, "dead_ids": list(memory.dead_ids),
        "multipliers": [list(hashing.multipliers[layer]) for layer in hashing.layers],
        "primes": [[list(heads) for heads in hashing.primes[layer]] for layer in hashing.layers],
        "rows": [hashing.table_rows[layer] for layer in hashing.layers],
        "token_map": {"length": lookup_V.size,
                      "base64": base64.b64encode(lookup_V.astype("<i4").tobytes()).decode()},
    }


def _from_values(fields: Any) -> tuple[TokenHash, dict[str, int]]:
    """The memory of an entry, and its sites with their layers."""
    names = {"sites", "variant", "layers", "rows_per_head", "heads", "seed", "vocab_size",
             "pad_id", "end_id", "dead_ids", "multipliers", "primes", "rows", "token_map"}
    require(isinstance(fields, dict) and fields.keys() == names, "fields",
            sorted(fields) if isinstance(fields, dict) else fields, f"must be {sorted(names)}")
    for name in ("heads", "seed", "vocab_size", "pad_id"):
        require(_is_whole(fields[name]), name, fields[name], "must be a whole number")
    for name in _WHOLE:
        require(isinstance(fields[name], list) and all(map(_is_whole, fields[name])), name,
                fields[name], "must be a list of whole numbers")
    require(fields["end_id"] is None or _is_whole(fields["end_id"]), "end_id", fields["end_id"],
            "must be a raw token id or null")
    hashing = NgramHash(
        rows_per_head=tuple(fields["rows_per_head"]), heads=fields["heads"],
        layers=tuple(fields["layers"]), vocab_size=fields["vocab_size"], pad_id=fields["pad_id"],
        seed=fields["seed"], variant=fields["variant"], numbers=HashNumbers(
            multipliers=_tuples("multipliers", fields["multipliers"], 2),
            primes=_tuples("primes", fields["primes"], 3)))
    rows = [hashing.table_rows[layer] for layer in hashing.layers]
    require(fields["rows"] == rows, "rows", fields["rows"], f"the primes sum to {rows}")
    memory = TokenHash(hashing=hashing, vocabulary=_token_map(fields["token_map"]),
                       end_id=fields["end_id"], dead_ids=tuple(fields["dead_ids"]))
    named = fields["sites"]
    require(isinstance(named, dict) and all(
        _is_whole(layer) and layer in hashing.layers for layer in named.values()),
            "sites", named, f"must give each site one of the layers {hashing.layers}")
    return memory, named


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tuples(name: str, value: Any, depth: int) -> Any:
    """Lists of lists as tuples; `depth` levels, then whole numbers."""
    if depth == 0:
        require(_is_whole(value), name, value, "must be whole numbers")
        return value
    require(isinstance(value, list), name, value, f"must be lists, {depth} deep")
    return tuple(_tuples(name, item, depth - 1) for item in value)


def _token_map(value: Any) -> CompressedVocabulary:
    require(isinstance(value, dict) and value.keys() == {"length", "base64"}, "token_map",
            value if not isinstance(value, dict) else sorted(value), "must have length and base64")
    try:
        lookup_V = np.frombuffer(base64.b64decode(value["base64"], validate=True), "<i4")
    except (binascii.Error, TypeError, ValueError) as error:
        raise UserError(f"token_map.base64: is no base64 of int32 ({error})") from error
    require(lookup_V.size == value["length"], "token_map.length", value["length"],
            f"the map has {lookup_V.size} ids")
    return CompressedVocabulary(lookup_V)
