"""Train a run to its end, from wherever it stopped."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from engram_jax import __version__, distributed
from engram_jax.config import RunConfig
from engram_jax.data.batches import train_batches
from engram_jax.errors import MachineError, Stopped
from engram_jax.hashing.artifact import HashArtifact
from engram_jax.runs.beginning import begin_from, kept_artifact
from engram_jax.runs.checkpoints import Checkpoints
from engram_jax.runs.directory import RunDirectory, environment
from engram_jax.runs.divergence import Divergence
from engram_jax.runs.evaluate import Evaluation, evaluator
from engram_jax.runs.lock import Lock
from engram_jax.runs.outcome import outcome
from engram_jax.runs.profiling import Profile
from engram_jax.runs.progress import Progress
from engram_jax.runs.reader import Inputs, open_inputs
from engram_jax.runs.stopping import Stopping
from engram_jax.runs.tensorboard import TensorBoard
from engram_jax.settings import changed, to_dict
from engram_jax.training import placement
from engram_jax.training.capacity import with_capacity
from engram_jax.training.fitting import fitted
from engram_jax.training.state import TrainState, init_state
from engram_jax.training.step import train_step


def train(
    run: RunConfig, directory: epath.PathLike, say: Callable[[str], None] = print,
    mesh: Mesh | None = None, profile: str = "",
) -> dict[str, Any]:
    """Train `run` in `directory` and return what result.json holds.

    A finished run is not run again; an interrupted one goes on from its last checkpoint, with the
    same bits on the same mesh. With several processes each calls this alike.

    Args:
      run: the run.
      directory: its folder, on a disk or in object storage that all processes reach.
      say: gets lines for people.
      mesh: of all devices (`mesh.make_mesh`); None takes `mesh.chosen_mesh`.
      profile: "FIRST:LAST" traces these steps into DIR/profile.

    Raises:
      UserError: bad data settings, or a directory that holds another run.
      MachineError: something could not be read or written, or the run diverged.
      Stopped: SIGTERM or Ctrl-C; a checkpoint of the last step is written.
    """
    mesh = mesh or placement.chosen_mesh()
    distributed.agree("the config", {
        "engram_jax": __version__, **to_dict(run), "mesh": placement.shape_of(mesh)})
    records = RunDirectory(directory)
    traced = Profile(records.path, profile)
    if (result := records.result()) is not None:
        records.check(run)
        say(f"{run.name}: done before, loss {result['loss']:.4f} (in {records.path})")
        return result
    with Stopping(run.training.grace_seconds, say) as stopping:
        inputs = open_inputs(_pinned(run, records), say, kept_artifact(run, records))
        distributed.agree("the text", {"data_fingerprint": inputs.tokens.fingerprint,
                                       "tokenizer_digest": inputs.tokens.tokenizer_digest})
        # Refuses bad settings before the folder is claimed.
        loop = _Loop(run, inputs, records, say, mesh)
        chosen = {"accumulate": loop.run.training.accumulate, "remat": loop.run.model.remat}
        distributed.agree("what fits the devices", chosen)
        env = environment(
            data_fingerprint=inputs.tokens.fingerprint,
            tokenizer_digest=inputs.tokens.tokenizer_digest,
            tokens=inputs.tokens.directory,
            data_revision=inputs.tokens.revision,
            mesh=placement.shape_of(loop.mesh),
            row_capacity=loop.run.training.row_capacity, **chosen)
        records.make()
        with Lock(records.path, say) as lock:
            stopping.at_last(lock.release)
            records.claim(run, env, inputs.tokenizer)
            return loop.run_to_end(env, lock, stopping, traced)


class _Loop:
    """The state of the loop itself: iterator, compiled step, clock, logs."""

    def __init__(
        self,
        run: RunConfig,
        inputs: Inputs,
        records: RunDirectory,
        say: Callable[[str], None],
        mesh: Mesh,
    ):
        placement.check(run, mesh)
        self.inputs, self.records, self.say, self.mesh = inputs, records, say, mesh
        self.batches = _batches(run, inputs)
        self.run = fitted(
            with_capacity(run, inputs.addressing, _batches(run, inputs), mesh), mesh)
        self.step = jax.jit(train_step(self.run, inputs.addressing, mesh), donate_argnums=0)
        self.evaluate = evaluator(self.run, inputs, mesh)
        self.batch_tokens = run.data.batch_size * run.data.sequence_length
        self.clock = _Clock()
        self.saved = 0  # step of the last checkpoint
        self.divergence = Divergence(run.training.skips_in_a_row)

    def run_to_end(
        self, env: Mapping[str, Any], lock: Lock, stopping: Stopping, profile: Profile
    ) -> dict[str, Any]:
        training = self.run.training
        fingerprints = self.inputs.fingerprints()
        with Checkpoints(
            self.records.checkpoints, training.keep_checkpoints, fingerprints
        ) as checkpoints:
            self.checkpoints, self.lock, self.stopping = checkpoints, lock, stopping
            state, start = self._begin(env)
            # Not before a checkpoint of an older version has been found to have the same.
            self.records.keep_artifact(HashArtifact.of(self.inputs.addressing))
            with (Progress(self.run.name, start, training.steps, self.say) as self.progress,
                  TensorBoard(self.records.path, training.tensorboard) as self.board):
                stopping.begin()
                if 0 < start < training.steps and due(start, training.evaluate_every):
                    self._evaluate(start, state)
                with profile as self.profile:
                    state = self._steps(state, start)
                evaluation = self._end(state)
        result = outcome(self.run, evaluation, self.records.metrics())
        self.records.finish(result)
        return result

    def _begin(self, env: Mapping[str, Any]) -> tuple[TrainState, int]:
        self.checkpoints.discard_unfinished()
        restored = self.checkpoints.restore_last(
            placement.placed_state(self.run, self.mesh), self.batches, self.say)
        state, start = restored or (self._first(), 0)
        if restored is None and self.run.training.start_from:
            beginning = begin_from(self.run, self.inputs, self.mesh, state, self.batches,
                                   self.records.source(), self.say)
            state, start = beginning.state, beginning.step
            env = {**env, "start_from": beginning.source}
        self.records.truncate_metrics(start)
        self.records.begin(start, env)
        self.saved = start
        if restored:
            self.say(f"{self.run.name}: going on from step {start}")
        return state, start

    def _first(self) -> TrainState:
        """The state before the first step."""
        placed = placement.shardings(self.run, self.mesh)
        init = jax.jit(lambda seed: init_state(self.run, seed), out_shardings=placed)
        state: TrainState = init(np.int32(self.run.training.seed))
        return state

    def _steps(self, state: TrainState, start: int) -> TrainState:
        training, pending = self.run.training, None
        for number in range(start + 1, training.steps + 1):
            if self.stopping.due():
                if pending:
                    self._log(*pending)
                self._stop(number - 1, state)
            with self.profile.step(number):
                state, metrics = self.step(state, placement.put(next(self.batches), self.mesh))
            self.profile.done(number, metrics)
            if pending:  # log step n - 1 while step n runs
                self._log(*pending)
            pending = number, metrics
            last = number == training.steps
            evaluates = due(number, training.evaluate_every) and not last
            saves = due(number, training.checkpoint_every) and not last
            if evaluates or saves or last:
                # What is in a checkpoint is in the records: whoever goes on from it repeats nothing
                # and misses nothing.
                self._log(*pending)
                pending = None
            # First what cannot be had again: an evaluation may need memory that is not there.
            if saves:
                self._save(number, state)
            if evaluates:
                self._evaluate(number, state)
        return state

    def _end(self, state: TrainState) -> Evaluation:
        """Save and evaluate the last state, as far as that was not done before a stop."""
        steps = self.run.training.steps
        self._save(steps, state)
        self.checkpoints.wait()
        evaluation = self._evaluate(steps, state)
        self.divergence.skips = 0  # it is a good state, whatever the last steps were
        self._save(steps, state)
        self.checkpoints.wait()
        return evaluation

    def _evaluate(self, number: int, state: TrainState) -> Evaluation:
        """Evaluate a state and record it; if it is to stop in between, the next start does it."""
        def before_each() -> None:
            if self.stopping.due():
                self._stop(number, state)

        evaluation = self.evaluate(state, before_each)
        self._record(number, evaluation)
        return evaluation

    def _stop(self, number: int, state: TrainState) -> NoReturn:
        if number > 0:
            self._save(number, state)
        self.checkpoints.wait()
        kept = self.checkpoints.latest
        raise Stopped(f"stopped by {self.stopping.reason} after step {number}; the same command "
                      + ("begins again" if kept is None else f"goes on from step {kept}"))

    def _save(self, number: int, state: TrainState) -> None:
        if self.divergence.skips:  # it might take the place of the last good one
            return
        if self.saved == number:
            return
        self.saved = number
        self.lock.check()
        self.records.flush()
        self.checkpoints.save(number, state, self.batches)

    def _log(self, number: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in metrics.items()}  # waits for the step
        seconds = self.clock.tick()
        values["perf/step_time_seconds"] = seconds
        values["perf/per_device_tokens_per_sec"] = (
            self.batch_tokens / seconds / self.mesh.size if seconds else 0.0)
        self.progress.step(number, values)
        self._keep(number, values)
        if wrong := values.get("exchange/disagreements"):
            raise MachineError(f"step {number}: rows of {wrong:.0f} tables did not reach the "
                               "devices that own them; the last checkpoint is good")
        if empty := values.get("exchange/empty_gradients"):
            self.say(f"{self.run.name}: step {number}: the gradient of {empty:.0f} tables is 0 "
                     "everywhere")
        self.divergence.watch(number, values)
        if lost := values.get("engram/ids_out_of_range"):
            self.say(f"{self.run.name}: step {number}: {lost:,.0f} row ids are of no row; "
                     "they read zeros and teach nothing")

    def _keep(self, number: int, values: Mapping[str, float]) -> None:
        training = self.run.training
        if number == training.steps or due(number, training.log_every):
            self.records.log({"step": number, **values})
            self.board.log(number, values)

    def _record(self, number: int, evaluation: Evaluation) -> None:
        """Keep an evaluation, unless that was done before a stop."""
        self.divergence.watch_evaluation(number, evaluation.loss)
        self.clock.skip()
        if any(row["step"] == number and "evaluation/loss" in row
               for row in self.records.metrics()):
            return
        values = {"evaluation/loss": evaluation.loss,
                  "evaluation/bits_per_byte": evaluation.bits_per_byte}
        self.records.log({"step": number, **values})
        self.board.log(number, values)


def _pinned(run: RunConfig, records: RunDirectory) -> RunConfig:
    """The run, reading what it began with from the hub, whatever is newest there today."""
    revision = records.env().get("data_revision")
    if run.data.revision or not isinstance(revision, str) or not revision:
        return run
    return changed(run, {"data.revision": revision})


def _batches(run: RunConfig, inputs: Inputs) -> grain.DatasetIterator:
    """This process's rows of the training batches."""
    return train_batches(inputs.tokens, run.data, process_index=jax.process_index(),
                         process_count=jax.process_count())


def due(number: int, every: int) -> bool:
    """Does something that happens every so many steps (0: never) happen at this one?"""
    return every > 0 and number % every == 0


@dataclasses.dataclass
class _Clock:
    """Time between steps; the first step after a start or a pause (it compiles) does not count."""

    last: float | None = None

    def tick(self) -> float:
        """Seconds since the last tick; 0 where there is none to count from."""
        now = time.perf_counter()
        seconds = 0.0 if self.last is None else now - self.last
        self.last = now
        return seconds

    def skip(self) -> None:
        self.last = None
