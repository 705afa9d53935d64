"""Reads all that a run keeps, and says what is damaged: `engram-jax verify RUN`."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from engram_jax.data.tokens import open_packed
from engram_jax.errors import MachineError, UserError
from engram_jax.offload.file import verify as verify_table
from engram_jax.runs.digests import damage, has_digests
from engram_jax.runs.directory import RunDirectory
from engram_jax.storage import is_local


class Finding(NamedTuple):
    """What was found of a part of a run.

    Attributes:
      path: of the part.
      problems: a line each; none where it is whole.
      note: what could not be checked, and why; "" if everything was.
    """

    path: str
    problems: list[str]
    note: str = ""


def verify_run(directory: epath.PathLike) -> Iterator[Finding]:
    """Everything in a run's folder, and the token shards that it reads, one after another.

    Raises:
      UserError: the folder holds no run.
    """
    records = RunDirectory(directory)
    if not (records.path / "config.json").exists():
        raise UserError(f"{records.path}: holds no run (there is no config.json)")
    for name, read in (("config.json", records.config), ("env.json", records.env),
                       ("tokenizer.json", records.tokenizer), ("metrics", records.metrics),
                       ("hash.json", records.artifact), ("result.json", records.result)):
        yield _checked(str(records.path / name), read)
    yield from _checkpoints(records)
    yield from _tables(records)
    yield _tokens(records)


def _checked(path: str, read: Callable[[], object]) -> Finding:
    try:
        read()
    except (UserError, MachineError) as error:
        return Finding(path, [str(error)])
    return Finding(path, [])


def _checkpoints(records: RunDirectory) -> Iterator[Finding]:
    if not records.checkpoints.exists():
        return
    folders = [path for path in records.checkpoints.iterdir() if path.name.isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name)):
        try:
            problems = damage(folder)
        except MachineError as error:
            problems = [str(error)]
        if problems and not (folder / "commit_success.txt").exists() and not has_digests(folder):
            continue  # the run that trains here has removed it meanwhile
        if has_digests(folder) and not (folder / "commit_success.txt").exists():
            problems.append(f"{folder}: commit_success.txt is missing")
        note = "" if has_digests(folder) else "no digests were written with it"
        yield Finding(str(folder), sorted(set(problems)), note)


def _tables(records: RunDirectory) -> Iterator[Finding]:
    folder = records.path / "tables"
    if is_local(folder) and folder.exists():
        for path in sorted(folder.glob("*.table")):
            yield _checked(str(path), lambda path=path: verify_table(path))  # type: ignore[misc]


def _tokens(records: RunDirectory) -> Finding:
    """The token shards that the last start read; they can be packed again from the text."""
    try:
        env = records.env()
    except UserError:
        env = {}
    folder = {**env, **(env.get("starts") or [{}])[-1]}.get("tokens")
    if not isinstance(folder, str):
        return Finding("token shards", [], "env.json does not say where they are")
    path = epath.Path(folder)
    if not (path / "meta.json").exists():
        return Finding(folder, [], "is not there any more; the text is packed again when needed")

    def read() -> None:
        tokens = open_packed(path)
        for shard in [*tokens.shards("train"), *tokens.shards("validation")]:
            shard.read_whole()

    return _checked(folder, read)
