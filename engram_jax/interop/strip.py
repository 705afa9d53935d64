"""A run's folder without what only training needs: `engram-jax export --format orbax`."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from etils import epath

from engram_jax.interop.export import NoPlace, write_records
from engram_jax.interop.released import whole_folder
from engram_jax.runs.checkpoints import Checkpoints, last_checkpoint
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import reader_of
from engram_jax.training.placement import placed_state, single_mesh

SERVED = ("step", "params", "router_bias", "tables")


def strip_run(directory: epath.PathLike, out: str | os.PathLike[str],
              say: Callable[[str], None] = lambda line: None) -> Path:
    """Write a run's folder whose one checkpoint has no optimizer state; its path.

    What serves, evaluates and looks into a run reads it; training cannot go on with it, but can
    begin from it. The state passes through this process's memory.

    Args:
      directory: of the run.
      out: the folder, which must not be there.
      say: told of the checkpoint.

    Raises:
      UserError: no run, no checkpoint, or the folder is there.
      MachineError: something cannot be read or written; then there is no folder.
    """
    records = RunDirectory(directory)
    run, reader = records.config(), reader_of(records)
    with last_checkpoint(records, reader) as checkpoints:
        step = checkpoints.saved_state().step
        state = checkpoints.restore(placed_state(run, single_mesh()), step=step, only=SERVED)
    state = dataclasses.replace(state, opt_state={}, table_state={})
    with whole_folder(out) as path:
        write_records(path, run, reader, records.result())
        with Checkpoints(RunDirectory(path).checkpoints, 1, reader.fingerprints()) as checkpoints:
            checkpoints.save(step, state, NoPlace())
            checkpoints.wait()
    say(f"step {step}, without its optimizer: {out}")
    return Path(out)
