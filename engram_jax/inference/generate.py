"""Text from a trained run, piece by piece."""

from collections.abc import Iterator

from engram_jax.config import require
from engram_jax.inference.engine import Engine, Request
from engram_jax.inference.serving import Served
from engram_jax.offload.device_cache import padded_size
from engram_jax.runs.reader import Reader

CHUNK = 256  # tokens of a prompt that are read at once


def generate(
    model: Served,
    prompt: str,
    *,
    tokens: int,
    cache: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Generate the text that follows `prompt`, piece by piece; it ends early at the end token.

    Args:
      model: a trained run.
      prompt: any text.
      tokens: how many tokens to generate.
      cache: how many tokens the cache holds, those of the prompt included; 0 is as many as needed.
      temperature, top_k, top_p, seed: as in `engine.Request`.

    Raises:
      UserError: an empty prompt, one longer than the cache, or a setting out of range.
    """
    reader = model.reader
    ids = reader.tokenizer.encode(prompt, add_special_tokens=False).ids
    require(len(ids) > 0, "prompt", prompt, "must have at least one token")
    request = Request(prompt=tuple(ids), tokens=tokens, temperature=temperature, top_k=top_k,
                      top_p=top_p, seed=seed)
    needed = len(ids) + tokens
    require(cache >= 0, "cache", cache, "must not be negative; 0 is as many as needed")
    require(needed <= (cache or needed), "cache", cache,
            f"is too small: the prompt's {len(ids)} tokens and {tokens} more need {needed}")
    engine = model.engine(slots=1, length=padded_size(cache or needed),
                          chunk=min(CHUNK, padded_size(len(ids))))
    engine.submit(request)
    return _pieces(engine, reader, ids)


def _pieces(engine: Engine, reader: Reader, ids: list[int]) -> Iterator[str]:
    text = reader.tokenizer.decode(ids)
    while engine.busy:
        for event in engine.step():
            if event.token == reader.end_id:
                return
            ids = [*ids, event.token]
            longer = reader.tokenizer.decode(ids)
            if not longer.endswith("\N{REPLACEMENT CHARACTER}"):  # else inside a character
                yield longer[len(text):]
                text = longer
