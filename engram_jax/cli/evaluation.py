"""The command that measures what a trained run can do: `evaluate`."""

import contextlib
import os
import sys
import typing
from collections.abc import Iterable, Iterator

from engram_jax.cli.words import (
    Commands,
    Options,
    Parser,
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

    from engram_jax.evaluation.long_texts import Masked
    from engram_jax.inference.serving import Served
    from engram_jax.results.scores import Score
    from engram_jax.runs.directory import RunDirectory
    from engram_jax.runs.reader import Reader
    from engram_jax.training.state import TrainState


MOST_TOKENS = 2**20  # of the validation text, for haystacks
QUESTIONS, PIECES = 50, 16  # of RULER's tasks, and of a long text, where --limit says nothing


def add(commands: Commands) -> None:
    command = add_command(
        commands, evaluate, "loss and bits per byte of a trained run on its validation text, its "
        "scores on tasks of lm-evaluation-harness or on RULER's long-context tasks, its LongPPL "
        "and its perplexity by position; all but the first are kept in DIR/scores.json",
        "evaluate runs/mine --set data.path=other.txt")
    add_directory(command)
    add_set(command)
    add_json(command)
    add_mesh(command, "all devices as 1xN (tasks and long texts: one device)")
    command.add_argument("--step", type=int, default=None, metavar="N",
                         help="of the checkpoint (default: the last)")
    command.add_argument("--limit", type=int, default=None, metavar="N",
                         help=f"questions of a task (default all, and {QUESTIONS} for RULER), or "
                         f"pieces of a text (default {PIECES})")
    command.add_argument("--text", default="", metavar="FILE",
                         help="that RULER's haystacks and questions are made of, or that is read "
                         "for LongPPL; default the run's validation text")
    command.add_argument("--batch-size", type=int, default=8, metavar="N",
                         help="sequences at once (default 8)")
    command.add_argument("--memory", choices=["device", "host", "disk"], default="device",
                         help="where the tables are (default device)")
    command.add_argument("--dtype", choices=ROW_DTYPES, default="",
                         help="of the rows on host or disk; default that of training")
    _add_tasks(command)
    _add_long_texts(command)


def _add_tasks(command: Parser) -> None:
    group = command.add_argument_group("questions", "see docs/evaluation.md")
    group.add_argument("--tasks", default="", metavar="NAME,...",
                       help="of lm-evaluation-harness (extra eval), `paper` for the paper's 27; or "
                       "with --ruler of RULER")
    group.add_argument("--include", default="", metavar="FOLDER",
                       help="of task files of your own, for the harness")
    group.add_argument("--shots", type=int, default=None, metavar="N",
                       help="examples before each question; default what each task says, and the "
                       "paper's for `paper`")
    group.add_argument("--unsafe-code", action="store_true",
                       help="run the programs that the model writes, for tasks that need it")
    group.add_argument("--ruler", default="", metavar="LENGTH,...",
                       help="RULER's tasks at these lengths in tokens, for example 2048,4096")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of RULER's questions")


def _add_long_texts(command: Parser) -> None:
    group = command.add_argument_group("long texts", "see docs/evaluation.md")
    group.add_argument("--longppl", default="", metavar="RUN|MASKS.json",
                       help="perplexity on key tokens, which another run tells, or a file")
    group.add_argument("--positions", action="store_true",
                       help="perplexity by position alone, without an evaluator")
    group.add_argument("--length", type=int, default=0, metavar="N",
                       help="tokens of a piece of the text; default what the run reads")
    group.add_argument("--window", type=int, default=4096, metavar="K",
                       help="tokens of the short contexts that key tokens gain over (default 4096)")
    group.add_argument("--slide", type=int, default=1024, metavar="N",
                       help="tokens that share a short context (default 1024)")
    group.add_argument("--keep-masks", default="", metavar="FILE",
                       help="gets the texts with their key tokens, for --longppl")


@keeping_programs
def evaluate(options: Options) -> None:
    require(options.limit is None or options.limit >= 1, "limit", options.limit,
            "must be at least 1")
    if options.ruler:
        _ruler(options)
    elif options.tasks:
        _tasks(options)
    elif options.longppl or options.positions:
        _long_texts(options)
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
    loss, per_byte, tokens = evaluator(run, inputs, mesh)(
        _restored(records, run, inputs, mesh, options.step))
    if options.json:
        print(json_text({"loss": loss, "bits_per_byte": per_byte, "tokens": tokens}))
    else:
        print(f"loss {loss:.4f} nats a token, {per_byte:.4f} bits per byte, {tokens:,} tokens")


def _restored(
    records: "RunDirectory", run: RunConfig, reader: "Reader", mesh: "Mesh", step: int | None
) -> "TrainState":
    """What a forward pass reads of a run's checkpoint, by default the last, split over the mesh."""
    from engram_jax.runs.checkpoints import last_checkpoint
    from engram_jax.training.placement import placed_state
    from engram_jax.training.state import READ

    with last_checkpoint(records, reader) as checkpoint:
        saved = checkpoint.saved_state(step)
        return checkpoint.restore(placed_state(run, mesh), step=saved.step, only=READ)


def _tasks(options: Options) -> None:
    from engram_jax.evaluation import benchmarks, harness

    chosen = benchmarks.chosen(_names(options.tasks), options.shots, options.unsafe_code)
    for line in chosen.told():
        print(line, file=sys.stderr)

    def each(part: dict[str, typing.Any]) -> None:  # hours later another task may fail
        _keep(options, harness.scores(part, model.step, options.limit))
        if not options.json:
            print(harness.table(part), flush=True)

    with _served(options) as model:
        results = harness.evaluate(model, chosen, options.include, options.limit,
                                   options.batch_size, each)
    if options.json:
        print(json_text(results["results"]))


def _ruler(options: Options) -> None:
    from engram_jax.evaluation import ruler_scores
    from engram_jax.evaluation.haystack import Source

    lengths = [int(word) if word.isdecimal() else 0 for word in options.ruler.split(",")]
    require(all(lengths), "ruler", options.ruler,
            "must be lengths in tokens, for example 2048,4096")
    with _served(options) as model:
        answers = ruler_scores.measured(
            model, Source(_text(options, model), model.reader.tokenizer), lengths,
            _names(options.tasks), QUESTIONS if options.limit is None else options.limit,
            options.seed, options.batch_size)
        print(json_text([score._asdict() for score in answers]) if options.json
              else ruler_scores.described(answers))
        _keep(options, ruler_scores.kept(answers, model.step, options.seed,
                                          _of_text(options)))


def _long_texts(options: Options) -> None:
    from engram_jax.evaluation import long_texts

    with _served(options) as model:
        texts = _masked(options, model)
        if options.keep_masks:
            long_texts.write_masks(options.keep_masks, texts)
        values = long_texts.measured(model, texts, options.batch_size)
        print(json_text(long_texts.to_json(values)) if options.json
              else long_texts.described(values))
        settings = {"text": _of_text(options), "texts": len(texts)}
        if options.longppl:
            settings |= {"evaluator": os.path.basename(os.path.abspath(options.longppl)),
                         "window": options.window, "slide": options.slide}
        _keep(options, long_texts.scores(values, model.step, settings))


def _masked(options: Options, model: "Served") -> "list[Masked]":
    """The texts that are read, with their key tokens where something tells them."""
    from engram_jax.evaluation import long_texts
    from engram_jax.evaluation.longppl import KeyTokens
    from engram_jax.inference.serving import served
    from engram_jax.runs.directory import RunDirectory

    if options.longppl.endswith(".json"):
        require(not options.text, "text", options.text, "is in the file of masks already")
        return long_texts.read_masks(options.longppl)[:options.limit]
    pieces = long_texts.pieces(
        model, _text(options, model), options.length or model.length,
        PIECES if options.limit is None else options.limit)
    if not options.longppl:
        return [long_texts.Masked(piece, []) for piece in pieces]
    evaluator = served(RunDirectory(options.longppl), options.memory, options.dtype,
                       mesh=options.mesh)
    with contextlib.closing(evaluator.rows):
        return long_texts.masked_by(
            evaluator, pieces, KeyTokens(window=options.window, slide=options.slide),
            options.batch_size)


def _text(options: Options, model: "Served") -> str:
    from engram_jax.data.reading import read_file
    from engram_jax.runs.reader import validation_text

    return (read_file(options.text, "text") if options.text
            else validation_text(model.run, MOST_TOKENS))


def _of_text(options: Options) -> str:
    return os.path.basename(options.text) or "validation"


def _keep(options: Options, scores: "Iterable[Score]") -> None:
    """Write scores into the run's folder, after they were printed."""
    from engram_jax.results.scores import keep_scores
    from engram_jax.runs.directory import RunDirectory

    keep_scores(RunDirectory(options.directory), scores)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextlib.contextmanager
def _served(options: Options) -> Iterator["Served"]:
    from engram_jax.inference.serving import served
    from engram_jax.runs.directory import RunDirectory

    require(not options.settings, "set", options.settings[:1],
            "is for the loss alone; tasks take a run as it is")
    model = served(RunDirectory(options.directory), options.memory, options.dtype, options.step,
                   options.mesh)
    with contextlib.closing(model.rows):
        yield model
