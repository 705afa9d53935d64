"""PatchScope: what a model says of one of its own inner states (Ghandeharioun et al. 2024,
arXiv 2401.06102)."""

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.insides.observing import Opened, Patch

PLACEHOLDER = "x"
PROMPT = "cat -> cat; 135 -> 135; hello -> hello; x ->"  # of that paper: say what stands here


def patchscope(
    opened: Opened, text: str, prompt: str = PROMPT, placeholder: str = PLACEHOLDER,
    tokens: int = 8,
) -> list[str]:
    """What the model says, layer by layer, of the state behind the last token of `text`.

    The streams after block L at that token take the place of the last `placeholder` of the prompt
    after the same block, and the model goes on from the prompt, likeliest token after token.

    Args:
      opened: the run.
      text: whose last token's state is read.
      prompt: that the state is put into.
      placeholder: a word of it, one token in its place.
      tokens: that are generated.

    Returns:
      One text for each block, the first block's first.

    Raises:
      UserError: a prompt without the placeholder, or an empty text.
    """
    source_T, prompt_T = opened.tokens(text), opened.tokens(prompt)
    require(source_T.size > 0, "text", text, "has no token")
    position = _place(opened, prompt_T, prompt, placeholder)
    states = _states(opened, source_T, len(prompt_T) + tokens)
    return [_continued(opened, prompt_T, Patch(state_MD, layer, position), tokens)
            for layer, state_MD in enumerate(states)]


def _states(opened: Opened, source_T: np.ndarray, room: int) -> list[jax.Array]:
    """The streams [M, D] after each block at the last token of the text.

    A text that fits into `room` is filled up and has a patch that lies nowhere, so that the pass is
    the same program as those of `_continued`.
    """
    model = opened.run.model
    padded_T = np.full(max(room, len(source_T)), opened.reader.pad_id, np.int32)
    padded_T[: len(source_T)] = source_T
    nowhere = Patch(jnp.zeros((model.streams, model.width), model.compute_dtype), -2, 0)
    streams = opened.observe(padded_T[None], patch=nowhere).streams[1:]
    # By way of the host: an array that is bound to a device would be another program.
    return [jnp.asarray(np.asarray(x_BTMD[0, len(source_T) - 1])) for x_BTMD in streams]


def _place(opened: Opened, prompt_T: np.ndarray, prompt: str, placeholder: str) -> int:
    """The token of the prompt that ends with the last placeholder."""
    at = prompt.rfind(placeholder)
    require(bool(placeholder) and at >= 0, "placeholder", placeholder,
            f"must be a part of the prompt {prompt!r}")
    spans = opened.encoded(prompt).offsets
    end = at + len(placeholder)
    return next(i for i in reversed(range(len(spans))) if spans[i][0] < end)


def _continued(opened: Opened, prompt_T: np.ndarray, patch: Patch, count: int) -> str:
    room_T = np.concatenate([prompt_T, np.full(count, opened.reader.pad_id, np.int32)])
    for position in range(len(prompt_T), len(room_T)):  # one shape, compiled once
        last = opened.observe(room_T[None], patch=patch).streams[-1]
        logits_V = opened.head(last)[0, position - 1, : opened.reader.vocab_size]
        room_T[position] = int(jnp.argmax(logits_V))
    text: str = opened.reader.tokenizer.decode(room_T[len(prompt_T):].tolist())
    return text
