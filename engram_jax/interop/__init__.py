"""Other people's weights, in and out: safetensors of released models, and of our runs.

Its page is docs/released_weights.md.
"""

from engram_jax.interop.demo import from_demo, to_demo
from engram_jax.interop.export import Exported, export_run, import_run, open_export
from engram_jax.interop.gguf import write_gguf_metadata
from engram_jax.interop.importing import import_folder, open_checkpoint
from engram_jax.interop.layers import QwenEngram, QwenState, V41Engram, layer_of
from engram_jax.interop.overlay import (
    OverlaidTable,
    Overlay,
    difference,
    lay_on_device,
    read_overlay,
    table_digest,
)
from engram_jax.interop.released import Released, open_released, write_released
from engram_jax.interop.strip import strip_run

__all__ = [
    "Exported", "OverlaidTable", "Overlay", "QwenEngram", "QwenState", "Released", "V41Engram",
    "difference", "export_run", "from_demo", "import_folder", "import_run", "lay_on_device",
    "layer_of", "open_checkpoint", "open_export", "open_released", "read_overlay", "strip_run",
    "table_digest", "to_demo", "write_gguf_metadata", "write_released"]
