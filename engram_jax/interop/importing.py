"""What a folder of other people's weights is, and how it comes in: `engram-jax import`."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.interop.deepseek import open_deepseek
from engram_jax.interop.export import FORMAT, import_run
from engram_jax.interop.qwen import open_qwen
from engram_jax.interop.released import Released, read_json, write_released


def import_folder(folder: str | os.PathLike[str], out: str | os.PathLike[str],
                  hash_file: str | os.PathLike[str] | None = None,
                  say: Callable[[str], None] = lambda line: None) -> Path:
    """Bring a checkpoint's memory, or an exported run, into a folder of ours; its path.

    Args:
      folder: a DeepSeek-V4.1 or Qwen3.8 checkpoint, or what `engram-jax export` wrote.
      out: the folder to make: of a memory (`released.py`), or of a run.
      hash_file: of a DeepSeek-V4.1 whose hash is known; None derives its token map.
      say: told of each table.

    Raises:
      UserError: another kind of folder, or something in it that is wrong.
      MachineError: something cannot be read or written. Whatever fails leaves no folder.
    """
    if read_json(Path(folder).expanduser() / "config.json").get("format") == FORMAT:
        require(hash_file is None, "hash", hash_file, "an exported run has its own")
        return import_run(folder, out, say)
    with contextlib.closing(open_checkpoint(folder, hash_file)) as released:
        return write_released(released, out, say)


def open_checkpoint(folder: str | os.PathLike[str],
                    hash_file: str | os.PathLike[str] | None = None) -> Released:
    """The memory of a released model's checkpoint, where it lies; by its config.

    Raises:
      UserError, MachineError: as `import_folder`.
    """
    path = Path(folder).expanduser()
    values = read_json(path / "config.json")
    text = values.get("text_config", values)
    text = text if isinstance(text, dict) else {}
    if "engram_layer_ids" in text:
        return open_deepseek(path, hash_file)
    require(hash_file is None, "hash", hash_file, "is for DeepSeek-V4.1, whose token map it has")
    if text.get("ple_layer_ids"):
        return open_qwen(path)
    raise UserError(f"{path / 'config.json'}: has neither engram_layer_ids (DeepSeek-V4.1) nor "
                    "ple_layer_ids (Qwen3.8-Flash-Next), and is no exported run")
