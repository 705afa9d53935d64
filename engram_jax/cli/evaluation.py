"""The command that measures what a trained run can do: `evaluate`."""

import contextlib
import typing
from collections.abc import Iterator

from engram_jax.cli.words import (
    Commands,
    Options,
    add_command,
    add_directory,
    add_json,
    add_mesh,
    add_set,
    keeping_programs,
)
from engram_jax.config import ROW_DTYPES, RunConfig, require
from engram_jax.settings import changed, json_text, with_settings

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh

    from engram_jax.inference.serving import Served
    from engram_jax.runs.directory import RunDirectory
    from engram_jax.runs.reader import Reader
    from engram_jax.training.state import TrainState


MOST_TOKENS = 2**20  # of the validation text, for haystacks


def add(commands: Commands) -> None:
    command = add_command(
        commands, evaluate, "loss and bits per byte of a trained run on its validation text, its "
        "scores on tasks of lm-evaluation-harness, or on RULER's long-context tasks",
        "evaluate runs/mine --set data.path=other.txt")
    add_directory(command)
    add_set(command)
    add_json(command)
    add_mesh(command)
    command.add_argument("--tasks", default="", metavar="NAME,...",
                         help="of lm-evaluation-harness (extra eval), or with --ruler of RULER")
    command.add_argument("--include", default="", metavar="FOLDER",
                         help="of task files of your own, for the harness")
    command.add_argument("--shots", type=int, default=None, metavar="N",
                         help="examples before each question; default what each task says")
    command.add_argument("--ruler", default="", metavar="LENGTH,...",
                         help="RULER's tasks at these lengths in tokens, for example 2048,4096")
    command.add_argument("--text", default="", metavar="FILE",
                         help="for RULER: what haystacks and questions are made of; default the "
                         "run's validation text")
    command.add_argument("--limit", type=int, default=None, metavar="N",
                         help="questions of a task; default all, and 50 for RULER")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of RULER's questions")
    command.add_argument("--batch-size", type=int, default=8, metavar="N",
                         help="sequences at once for tasks (default 8)")
    command.add_argument("--memory", choices=["device", "host", "disk"], default="device",
                         help="where the tables are for tasks (default device)")
    command.add_argument("--dtype", choices=ROW_DTYPES, default="",
                         help="of the rows on host or disk; default that of training")


@keeping_programs
def evaluate(options: Options) -> None:
    if options.ruler:
        _ruler(options)
    elif options.tasks:
        _tasks(options)
    else:
        _loss(options)


def _loss(options: Options) -> None:
    from engram_jax.runs.directory import RunDirectory
    from engram_jax.runs.evaluate import evaluator
    from engram_jax.runs.reader import open_inputs
    from engram_jax.training.placement import reading_mesh

    records = RunDirectory(options.directory)
    own = f"data.tokenizer={records.tokenizer_path}"
    run = with_settings(records.config(), [own, *options.settings])
    inputs = open_inputs(run, artifact=records.artifact())  # in silence: the answer is printed
    run = changed(run, {"training.accumulate": 1})
    mesh = reading_mesh(run, options.mesh)
    loss, per_byte, tokens = evaluator(run, inputs, mesh)(_restored(records, run, inputs, mesh))
    if options.json:
        print(json_text({"loss": loss, "bits_per_byte": per_byte, "tokens": tokens}))
    else:
        print(f"loss {loss:.4f} nats a token, {per_byte:.4f} bits per byte, {tokens:,} tokens")


def _restored(
    records: "RunDirectory", run: RunConfig, reader: "Reader", mesh: "Mesh"
) -> "TrainState":
    """What a forward pass reads of a run's last checkpoint, split over the mesh."""
    from engram_jax.runs.checkpoints import last_checkpoint
    from engram_jax.training.placement import placed_state
    from engram_jax.training.state import READ

    with last_checkpoint(records, reader) as checkpoint:
        return checkpoint.restore(placed_state(run, mesh), only=READ)


def _tasks(options: Options) -> None:
    from engram_jax.evaluation import harness

    names = _names(options.tasks)
    with _served(options) as model:
        results = harness.evaluate(model, names, options.include, options.shots, options.limit,
                                   options.batch_size)
        print(json_text(results["results"]) if options.json else harness.table(results))


def _ruler(options: Options) -> None:
    from engram_jax.data.reading import read_file
    from engram_jax.evaluation import ruler_scores
    from engram_jax.evaluation.haystack import Source
    from engram_jax.runs.reader import validation_text

    lengths = [int(word) if word.isdecimal() else 0 for word in options.ruler.split(",")]
    require(all(lengths), "ruler", options.ruler,
            "must be lengths in tokens, for example 2048,4096")
    with _served(options) as model:
        text = (read_file(options.text, "text") if options.text
                else validation_text(model.run, MOST_TOKENS))
        scores = ruler_scores.measured(
            model, Source(text, model.reader.tokenizer), lengths, _names(options.tasks),
            50 if options.limit is None else options.limit, options.seed, options.batch_size)
    print(json_text([score._asdict() for score in scores]) if options.json
          else ruler_scores.described(scores))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextlib.contextmanager
def _served(options: Options) -> Iterator["Served"]:
    from engram_jax.inference.serving import served
    from engram_jax.runs.directory import RunDirectory

    require(not options.settings, "set", options.settings[:1],
            "is for the loss alone; tasks take a run as it is")
    model = served(RunDirectory(options.directory), options.memory, options.dtype)
    with contextlib.closing(model.rows):
        yield model
