"""Files and settings that strangers wrote: each is taken, or refused in one line."""

import json
import pathlib
import random
import shutil
import traceback

import numpy as np
from etils import epath

from engram_jax.cli.endings import one_line
from engram_jax.config import DataConfig
from engram_jax.data.reading import read_file
from engram_jax.data.sources import open_source
from engram_jax.data.tokens import open_packed
from engram_jax.errors import MachineError, UserError
from engram_jax.insides import spans, tasks
from engram_jax.offload import file as table_file
from engram_jax.recipes import read_config
from engram_jax.runs import digests
from engram_jax.runs.directory import RunDirectory
from engram_jax.runs.reader import open_reader, reader_of
from engram_jax.settings import with_settings

WORDS = [b"", b"null", b"NaN", b"-1", b"1e999", b'"x"', b"[]", b"{}", b"true", b"0.5", b"\xff",
         b"\xef\xbb\xbf", b"\0", b"[" * 3000, b"9" * 400, "\u2028".encode(), b"../../x", b"\r\n"]


def mutated(data, draw):
    """The bytes with one to three changes: flips, cuts, insertions, repetitions, other values."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at:at + draw.randint(1, 20)]
        elif kind == 3:
            data[at:at] = draw.choice(WORDS)
        elif kind == 4:
            data[at:at] = data[at:at + draw.randint(1, 50)]
        else:  # another value after a colon or a comma
            ends = [n for n, byte in enumerate(data) if byte in b":,"]
            if ends:
                at = draw.choice(ends) + 1
                stop = next((n for n in range(at, len(data)) if data[n] in b",}]"), len(data))
                data[at:stop] = draw.choice(WORDS)
    return bytes(data)


class Fuzz:
    """Files of a run, changed and read again.

    Args:
      trained: the folder of a finished run, with a table in `tables`.
      folder: for what is made of it.
    """

    def __init__(self, trained, folder, seed=0):
        self.run, self.draw = folder / "run", random.Random(seed)
        shutil.copytree(trained, self.run)
        records = RunDirectory(self.run)
        self.config = records.config()
        self.tokens = folder / "tokens"
        shutil.copytree(records.env()["tokens"], self.tokens)
        self.text = folder / "text.jsonl"
        self.text.write_text("".join(json.dumps({"text": f"document {n} of made-up text"}) + "\n"
                                     for n in range(30)))
        self.tasks = folder / "tasks.jsonl"
        self.tasks.write_text("".join(
            json.dumps({"task": "a", "prompt": f"ka {n}", "answer": " lo"}) + "\n"
            for n in range(5)))
        self.spans = folder / "spans.txt"
        self.spans.write_text("0 4\n10 20\n7 9\n")
        self.reader = reader_of(records)

    def kinds(self):
        """For each kind of input its file, or None for a text, and what reads it."""
        records = RunDirectory(self.run)
        newest = max((self.run / "checkpoints").iterdir(), key=lambda path: int(path.name))
        [table] = (self.run / "tables").glob("*.table")
        return {
            "config.json": (self.run / "config.json", records.config),
            "another's config.json": (self.run / "config.json", lambda: read_config(
                epath.Path(self.run / "config.json"))),
            "env.json": (self.run / "env.json", records.env),
            "result.json": (self.run / "result.json", records.result),
            "metrics.jsonl": (self.run / "metrics.jsonl", lambda: RunDirectory(
                self.run).metrics()),
            "hash.json": (self.run / "hash.json", lambda: (
                records.artifact().addressing(self.config.model))),
            "tokenizer.json": (self.run / "tokenizer.json", lambda: open_reader(
                self.config, records.tokenizer())),
            "digests.json": (newest / digests.FILE, lambda: whole(newest)),
            "token shard": (self.tokens / "train-00000.npy", lambda: open_packed(self.tokens)),
            "meta.json": (self.tokens / "meta.json", lambda: open_packed(self.tokens)),
            "JSONL": (self.text, self.read_text),
            "table": (table, lambda: table_file.verify(table)),
            "tasks": (self.tasks, lambda: tasks.parsed(read_file(str(self.tasks), "tasks"))),
            "spans": (self.spans, lambda: spans.listed(read_file(str(self.spans), "spans"), 100)),
        }

    def read_text(self):
        source = open_source(DataConfig(path=str(self.text), tokenizer="bpe:300"))
        for _ in source.parts():
            pass

    def files(self, times):
        """Each kind of file, changed `times` times: outcomes as `kills.Runs` has them."""
        outcomes = {}
        for kind, (path, read) in self.kinds().items():
            whole = path.read_bytes()
            outcomes[kind] = []
            for _ in range(times):
                path.write_bytes(mutated(whole, self.draw))
                outcomes[kind].append(tried(read, f"{kind}: {path.read_bytes()[:300]!r}"))
            path.write_bytes(whole)
        return outcomes

    def overrides(self, times):
        """Settings of the command line, changed."""
        whole = [b"training.steps=12", b"optimizer.decay_at=[0.5,0.9]", b"model.engram.heads=2",
                 b"data.path=x", b"model.moe=none", b"training.tensorboard=true"]
        return [tried(lambda text=text: with_settings(self.config, [text]), f"--set {text!r}")
                for _ in range(times) for text in [mutated(
                    self.draw.choice(whole), self.draw).decode(errors="replace")]]

    def prompts(self, times):
        """Any text is tokens of the vocabulary, and the text again."""
        tokenizer = self.reader.tokenizer
        outcomes = []
        for _ in range(times):
            text = mutated("ka lo <|end|> é 汉 \U0001f600".encode(), self.draw).decode(
                errors="replace")
            ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)
            fits = ids.size == 0 or ids.max() < self.reader.vocab_size
            outcomes.append("recovered" if fits else f"prompt {text!r}: ids {ids}")
        return outcomes


def whole(checkpoint):
    """Refuses a checkpoint of which anything is damaged."""
    if lines := digests.damage(epath.Path(checkpoint)):
        raise MachineError(lines[0])


def tried(read, what):
    """"recovered" where it is taken, "stopped" where it is refused in one line."""
    try:
        read()
    except (UserError, MachineError) as error:
        return "stopped" if one_line(error).strip() else f"{what}: no words"
    except Exception:
        return f"{what}: {traceback.format_exc(limit=-2)}"
    return "recovered"


def tables(path, draw, times):
    """A table file that was changed is never taken for whole.

    Returns:
      Outcomes: "stopped" where it was told.
    """
    whole, outcomes = pathlib.Path(path).read_bytes(), []
    for _ in range(times):
        data = bytearray(whole)
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        pathlib.Path(path).write_bytes(data if draw.random() < 0.7 else data[:at])
        told = tried(lambda: table_file.verify(path), f"table byte {at}")
        outcomes.append(f"table byte {at}: taken for whole" if told == "recovered" else told)
    pathlib.Path(path).write_bytes(whole)
    return outcomes
