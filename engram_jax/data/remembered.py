"""Which text a source held when it was last read, so that a start need not read it again.

A source is known by its stamp: paths, sizes and times of its files, or the commit of a dataset. A
text that changes has another stamp.
"""

import contextlib
import json
import time
from typing import Any, NamedTuple

from engram_jax.config import DataConfig
from engram_jax.data.cache import cache_folder, cache_key, publish, working_folder
from engram_jax.data.sources import Source

SETTLED_NS = 2 * 10**9  # a file that has just been written may change within one tick of its clock


class Known(NamedTuple):
    """A text: its fingerprint, and that of the beginning on which tokenizers are trained."""

    fingerprint: str
    trained_on: str


def stamp(source: Source) -> Any:
    """The stamp of a source as it is; None where only reading it tells."""
    try:
        return source.stamp()
    except Exception:  # a file that is gone, a store that fails: the reading has the words for it
        return None


def recall(config: DataConfig, stamp: Any) -> Known | None:
    """The text that a source with this stamp holds; None where that is not known."""
    if stamp is None:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError):
        values = json.loads((_folder(config) / _name(config, stamp)).read_text())
        known = Known(**values)
        if all(isinstance(value, str) for value in known):
            return known
    return None


def remember(config: DataConfig, source: Source, before: Any, text: Known) -> None:
    """Note which text was read; not where its stamp would not tell a change.

    Args:
      before: the stamp before the reading.
    """
    if before is None or stamp(source) != before or _newest(before) + SETTLED_NS > time.time_ns():
        return
    with working_folder(config) as folder:
        (folder / _name(config, before)).write_text(json.dumps(text._asdict()))
        publish(folder, _folder(config), [_name(config, before)])


def _newest(stamp: Any) -> float:
    """The latest time in a stamp, nanoseconds."""
    if isinstance(stamp, list):
        return max(map(_newest, stamp), default=0)
    return stamp if isinstance(stamp, int) else 0


def _folder(config: DataConfig) -> Any:
    return cache_folder(config) / "texts"


def _name(config: DataConfig, stamp: Any) -> str:
    return cache_key("text", config.text_field, stamp) + ".json"
