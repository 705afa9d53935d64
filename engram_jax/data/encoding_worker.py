"""A process that tokenizes: texts in by standard input, ids out by standard output.

It is run as a file, not as a module, and imports nothing of this package, so that it starts
quickly, never runs the user's own program a second time (as multiprocessing would), and ends when
the process that started it does.

A message is a line of JSON and as many bytes as it says. First comes the tokenizer, {"bytes": N};
then texts, {"sizes": [N, ...]}, UTF-8. The answer is {"counts": [N, ...]} and the ids as uint32.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, uint32 [T]; special tokens that a text spells out are text.

    Args:
      tokenizer: of `tokenizers`, told to take them so (`tokenizer.parse_tokenizer`).
    """
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def main() -> None:
    """Answer until standard input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    tokenizer = Tokenizer.from_str(source.read(json.loads(source.readline())["bytes"]).decode())
    tokenizer.encode_special_tokens = True
    while line := source.readline():
        texts = [source.read(size).decode() for size in json.loads(line)["sizes"]]
        ids = encode(tokenizer, texts)
        sink.write(json.dumps({"counts": [len(each) for each in ids]}).encode() + b"\n")
        sink.write(b"".join(each.tobytes() for each in ids))
        sink.flush()


if __name__ == "__main__":
    main()
