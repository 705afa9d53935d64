"""Orbax checkpoints of the state and the data iterator, together and asynchronous.

Each checkpoint also carries the fingerprints of the tokenizer and of each memory's hash: embedding
and rows are worth nothing to a model that reads or hashes otherwise.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from engram_jax import distributed
from engram_jax.errors import MachineError, UserError
from engram_jax.hashing.addressing import INPUT_SITE
from engram_jax.runs.digests import damage, has_digests, write_digests
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import Reader
from engram_jax.storage import first_line, is_local, refusals
from engram_jax.training.state import TrainState

CHUNK = 64 * 2**20  # bytes of a table that are read, and so must be in memory, together


class SavedState(NamedTuple):
    """A whole checkpoint.

    Attributes:
      step, saved_ns: its step, and when it was saved, in ns since 1970: together they tell it from
        one of the same step of a run that was trained anew.
      place: where its arrays are.
    """

    step: int
    saved_ns: int
    place: epath.Path


class Checkpoints:
    """The checkpoints of one run; use as a context manager.

    Args:
      directory: where they are kept; made if it is not there.
      keep: how many of the latest are kept.
      fingerprints: what the state is worth nothing without (`Reader.fingerprints`).
    """

    def __init__(self, directory: epath.Path, keep: int, fingerprints: Mapping[str, str]):
        self._directory = directory
        self._fingerprints = dict(fingerprints)
        self._saving: tuple[int, Future[None]] | None = None
        self._background = ThreadPoolExecutor(1)
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            context=ocp.Context(array_options=ocp.options.ArrayOptions(
                saving=ocp.options.ArrayOptions.Saving(scoped_storage_options_creator=_storage))))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._background.shutdown()
            self._checkpointer.close()
        except Exception:  # of the write that was under way; `error` says more
            if error is None:
                raise

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, in order."""
        return sorted(filter(self._is_whole, self._steps()))

    def saved_ns(self, step: int) -> int:
        """When a checkpoint was saved, in ns since 1970.

        Raises:
          MachineError: it cannot be read.
        """
        return int(self._metadata(step).init_timestamp_nsecs)

    def discard_unfinished(self) -> None:
        """Remove what a kill left half-written; for the run that writes here, at its start."""
        if distributed.is_first():
            # Not `_steps`: in object storage orbax leaves such folders out.
            there = self._directory.iterdir() if self._directory.exists() else ()
            for place in list(there):
                if not place.name.isdecimal() or self._is_whole(int(place.name)):
                    continue
                if has_digests(place):  # it was whole once
                    self._set_aside(place)
                else:
                    place.rmtree()
        distributed.barrier("the removal of unfinished checkpoints")
        self._checkpointer.reload()

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        """Copy state and iterator off the device now, write them in the background.

        Raises:
          MachineError: this checkpoint or the one before could not be written.
        """
        self.wait()
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, {"state": state, "batches": batches.get_state()},
                custom_metadata={"fingerprints": self._fingerprints})
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, error) from error
        if response is not None:
            self._saving = (step, self._background.submit(self._finish, step, response))

    def _finish(self, step: int, response: Any) -> None:
        """Wait, in a thread, until the checkpoint is whole, and write its digests."""
        response.result()
        if distributed.is_first():
            write_digests(self._directory / str(step))

    def wait(self) -> None:
        """Wait until what is being written is whole.

        Raises:
          MachineError: it could not be written; earlier checkpoints are as they were.
        """
        if self._saving is None:
            return
        (step, finished), self._saving = self._saving, None
        try:
            finished.result()
        except Exception as error:  # tensorstore's errors have no common base
            raise self._failed(step, error) from error

    def restore(
        self, abstract: TrainState, batches: Any | None = None, step: int | None = None,
        only: Sequence[str] = (),
    ) -> TrainState:
        """The state of a checkpoint (the latest by default); `batches` is wound to its place.

        Args:
          abstract: shapes and dtypes, and where each array shall lie (`mesh.placed_state`): any
            mesh, whatever the mesh was that wrote it.
          batches: the iterator; in any number of processes.
          step: of the checkpoint.
          only: fields of the state to read; what the others hold then is of no use. () reads all.

        Raises:
          UserError: no checkpoint, another hash or tokenizer, other shapes or dtypes.
          MachineError: the checkpoint cannot be read.
        """
        step = self._latest() if step is None else step
        saved = self._check(step, abstract, only)
        left_out = [name for name in vars(abstract) if only and name not in only]
        wanted: dict[str, Any] = {"state": dataclasses.replace(abstract, **{
            # What a checkpoint for serving does not have at all is nothing.
            name: jax.tree.map(lambda _: ocp.PLACEHOLDER, getattr(abstract, name))
            if name in saved else {} for name in left_out})}
        if batches is not None:
            wanted["batches"] = batches.get_state()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a private orbax API
                saved = self._checkpointer.load_checkpointables(step, wanted)
        except Exception as error:  # as in `wait`
            raise MachineError(f"{self._directory / str(step)}: cannot be read: "
                               f"{first_line(error)}") from error
        if batches is not None:
            batches.set_state(jax.tree.map(int, saved["batches"]))
        return saved["state"]

    def restore_last(
        self, abstract: TrainState, batches: Any, say: Callable[[str], None] = lambda line: None
    ) -> tuple[TrainState, int] | None:
        """The last checkpoint that is whole, and its step; None where there never was one.

        Of a newer one that is damaged `say` gets the files, and it is moved to `damaged` beside
        the checkpoints.

        Raises:
          UserError: as `restore`.
          MachineError: the only one is damaged, or as `restore`.
        """
        while (step := self.latest) is not None:
            lines = distributed.from_first(
                f"the digests of checkpoint {step}", lambda: damage(self._directory / str(step)))
            if not lines:
                try:
                    return self.restore(abstract, batches, step), step
                except MachineError as error:
                    # One of an older version shows only now that it is damaged. Where digests are
                    # right, or several processes would have to agree, the machine is to blame.
                    if has_digests(self._directory / str(step)) or jax.process_count() > 1:
                        raise
                    lines = [str(error)]
            for line in lines:
                say(f"damaged: {line}")
            self._without(step, lines, say)
        return None

    def _without(self, step: int, lines: Sequence[str], say: Callable[[str], None]) -> None:
        """Go back to the checkpoint before `step`, which is damaged."""
        earlier = max((other for other in self._steps() if other < step and self._is_whole(other)),
                      default=None)
        if earlier is None:
            raise MachineError(f"{lines[0]}; no earlier checkpoint is left: put it back from a "
                               f"copy, or remove {self._directory} to begin again")
        if distributed.is_first():
            aside = self._set_aside(self._directory / str(step))
            say(f"the damaged checkpoint of step {step} is now {aside}; going back to step "
                f"{earlier}")
        distributed.barrier("the removal of a damaged checkpoint")
        self._checkpointer.reload()

    def _set_aside(self, folder: epath.Path) -> epath.Path:
        """Move a damaged checkpoint where nothing looks for one."""
        beside = folder.parent.parent / "damaged"
        taken = {path.name for path in beside.iterdir()} if beside.exists() else set()
        names = (f"{folder.name}{f'-{again}' if again else ''}" for again in range(len(taken) + 1))
        aside = beside / next(name for name in names if name not in taken)
        with refusals(aside, "written"):
            beside.mkdir(parents=True, exist_ok=True)
            if is_local(folder):
                folder.rename(aside)
            else:
                _copy(folder, aside)
                folder.rmtree()
        return aside

    def saved_state(self, step: int | None = None) -> SavedState:
        """A checkpoint; the last one unless a step is named.

        Raises:
          UserError: no such checkpoint, or one of another hash or tokenizer.
          MachineError: it cannot be read.
        """
        if step is not None and step not in (steps := self.steps):
            raise UserError(f"step = {step}: {self._directory} has no checkpoint of it; there are "
                            f"{', '.join(map(str, steps))}")
        step = self._latest() if step is None else step
        metadata = self._metadata(step)
        self._check_fingerprints(step, metadata)
        place = self._directory / str(step) / "state"
        return SavedState(step, metadata.init_timestamp_nsecs, place)

    def _latest(self) -> int:
        if (step := self.latest) is None:
            raise UserError(f"{self._directory}: holds no whole checkpoint")
        return step

    def _steps(self) -> list[int]:
        return [saved.step for saved in self._checkpointer.checkpoints]

    def _is_whole(self, step: int) -> bool:
        # Written last; where renaming a folder is not atomic, the name alone proves nothing.
        return (self._directory / str(step) / "commit_success.txt").exists()

    def _metadata(self, step: int) -> Any:
        """What orbax knows of a checkpoint, that of its arrays included."""
        try:
            metadata = self._checkpointer.checkpointables_metadata(step)
            if metadata.metadata["state"] is None:
                raise ValueError("the description of its arrays is damaged or missing")
        except Exception as error:
            raise MachineError(f"{self._directory / str(step)}: cannot be read: "
                               f"{first_line(error)}") from error
        return metadata

    def _check_fingerprints(self, step: int, metadata: Any) -> None:
        """Refuse a checkpoint whose rows mean something else."""
        carried = dict((metadata.custom_metadata or {}).get("fingerprints", {}))
        if "vocabulary" not in carried and "tokenizer" in carried:
            # Of version 0.1.0, which digested the words of a tokenizer alone.
            carried["vocabulary"] = carried["tokenizer"]
            carried["tokenizer"] = self._fingerprints.get("tokenizer", "")
        if carried == self._fingerprints:
            return
        name = min(set(carried.items()) ^ set(self._fingerprints.items()))[0]
        what = "" if name in ("tokenizer", "vocabulary") else f"the memory {name!r} of "
        raise UserError(
            f"{self._directory / str(step)}: {what}this model was trained with another tokenizer "
            f"or hash (digest {_ends(carried.get(name))}, here "
            f"{_ends(self._fingerprints.get(name))}); use the data and hash settings that it was "
            "trained with")

    def _check(self, step: int, abstract: TrainState, only: Sequence[str]) -> set[str]:
        """Refuse a checkpoint whose rows, shapes or dtypes mean something else; the fields that it
        has."""
        place, metadata = self._directory / str(step), self._metadata(step)
        self._check_fingerprints(step, metadata)
        saved = metadata.metadata["state"]
        expected, there = _leaves(abstract), _leaves(saved)
        for path in sorted(expected.keys() | there.keys()):
            if only and path.partition(".")[0] not in only:
                continue
            none = "none", "none"
            for what, has, wants in zip(("shape", "dtype"), there.get(path, none),
                                        expected.get(path, none), strict=True):
                if has != wants:  # another dtype, bits of bfloat16 too, orbax would cast by value
                    raise UserError(f"{place}: {path} has {what} {has}, the model wants {wants}"
                                    + (_right_dtype(path, str(has)) if what == "dtype" else ""))
        return {path.partition(".")[0] for path in there}

    def _failed(self, step: int, error: Exception) -> MachineError:
        kept = self.latest
        last = "there is no earlier one" if kept is None else f"the last good one is of step {kept}"
        return MachineError(f"{self._directory}: the checkpoint of step {step} could not be "
                            f"written ({first_line(error)}); {last}")


def _copy(folder: epath.Path, target: epath.Path) -> None:
    """Copy what is in a folder of object storage."""
    for entry in list(folder.iterdir()):
        if entry.is_dir():
            _copy(entry, target / entry.name)
        else:
            entry.copy(target / entry.name, overwrite=True)


def last_checkpoint(records: RunDirectory, reader: Reader) -> Checkpoints:
    """The checkpoints of a run that has some.

    Raises:
      UserError: it has none.
    """
    if not records.checkpoints.exists():
        raise UserError(f"{records.path}: has no checkpoint yet; train it first")
    return Checkpoints(records.checkpoints, records.config().training.keep_checkpoints,
                       reader.fingerprints())


def _storage(path: Sequence[Any], array: Any) -> Any:
    """Orbax's storage options of an array: tables in chunks of at most `CHUNK`, if that can be.

    A table [S, R, D] that lies on one device is cut into stretches of all shards, in which ids
    follow one another. Chunks have to divide what a device holds, so where R has no fitting divisor
    and on several devices a chunk is one shard, whose rows are cut only if CHUNK is passed.
    """
    if getattr(path[0], "name", "") != "tables":
        return None
    shards, rows, dim = array.sharding.shard_shape(array.shape)
    row_bytes, options = dim * array.dtype.itemsize, ocp.options.ArrayOptions.Saving.StorageOptions
    if shards * rows * row_bytes <= CHUNK:
        return None
    stretch = _largest_divisor(rows, CHUNK // (shards * row_bytes))
    if shards == array.shape[0] and 16 * stretch * shards * row_bytes >= CHUNK:
        return options(chunk_byte_size=stretch * shards * row_bytes)
    part = _largest_divisor(rows, CHUNK // row_bytes)
    part = part if 16 * part * row_bytes >= CHUNK else rows
    return options(chunk_byte_size=part * row_bytes, shard_axes=(0,))


def _largest_divisor(number: int, most: int) -> int:
    """Find the largest divisor of `number` that is not above `most`; 0 if there is none."""
    return next((divisor for divisor in range(min(number, most), 0, -1)
                 if number % divisor == 0), 0)


def _ends(digest: str | None) -> str:
    if digest is None:
        return "none"
    return ":".join(part[:8] for part in digest.split(":"))


def _right_dtype(path: str, saved: str) -> str:
    """The setting that a checkpoint with a table of this dtype wants."""
    field, _, table = path.partition(".")
    name = {"float32": "float32", "uint16": "bfloat16"}.get(saved)
    if field != "tables" or name is None:
        return ""
    memory = "over_encoding" if table == INPUT_SITE else "engram"
    return f"; set model.{memory}.table_dtype to {name!r}, as the run that wrote it"


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array by its path; a path's parts are the same for any container."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                     for key in path): (tuple(leaf.shape), str(jax.numpy.dtype(leaf.dtype)))
            for path, leaf in leaves}
