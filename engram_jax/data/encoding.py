"""Texts to ids on all cores, in order: the same ids whatever the number of processes."""

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from engram_jax.data import encoding_worker
from engram_jax.errors import MachineError

T = TypeVar("T")
AHEAD = 2  # texts that wait for each process


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoded(jobs: Iterable[T], texts: Callable[[T], Sequence[str]], tokenizer: Tokenizer,
            processes: int) -> Iterator[tuple[T, list[np.ndarray]]]:
    """Each job with the ids of its texts, uint32 [T] each, in the order of the jobs.

    Few jobs are held at once: AHEAD for each process.

    Args:
      texts: of a job.
      processes: to tokenize in; 0 is this one.

    Raises:
      MachineError: a process was killed, for example for want of memory.
    """
    if not processes:
        for job in jobs:
            yield job, encoding_worker.encode(tokenizer, texts(job))
        return
    waiting: collections.deque[tuple[T, Future[list[np.ndarray]]]] = collections.deque()
    with _pool(tokenizer, processes) as submit:
        for job in jobs:
            waiting.append((job, submit(texts(job))))
            if len(waiting) >= AHEAD * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


@contextlib.contextmanager
def _pool(tokenizer: Tokenizer, processes: int
          ) -> Iterator[Callable[[Sequence[str]], Future[list[np.ndarray]]]]:
    """Processes that tokenize, each waited for by a thread of this one."""
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    workers = [_Worker(tokenizer) for _ in range(processes)]
    for worker in workers:
        free.put(worker)

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        worker = free.get()
        try:
            return worker.encode(texts)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(processes) as threads:
        try:
            yield lambda texts: threads.submit(encode, texts)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that tokenizes."""

    def __init__(self, tokenizer: Tokenizer):
        # One thread: there is a process for each core.
        own = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", encoding_worker.__file__], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=own)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._sink, self._source = self._process.stdin, self._process.stdout
        data = tokenizer.to_str().encode()
        with self._alive():
            self._send({"bytes": len(data)}, data)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `encoding_worker.encode`.

        Raises:
          MachineError: the process has ended.
        """
        data = [text.encode() for text in texts]
        with self._alive():
            self._send({"sizes": [len(each) for each in data]}, b"".join(data))
            counts = json.loads(self._source.readline() or "null")["counts"]
            ids = np.frombuffer(self._source.read(4 * sum(counts)), np.uint32)
        return np.split(ids, np.cumsum(counts)[:-1])

    def _send(self, head: dict[str, object], data: bytes) -> None:
        self._sink.write(json.dumps(head).encode() + b"\n")
        self._sink.write(data)
        self._sink.flush()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TypeError, ValueError) as error:  # the pipe is broken or at its end
            code = self._process.poll()
            raise MachineError(f"a process that tokenizes has ended (exit code {code}); on a "
                               "machine with little memory use fewer, `pack --processes 1`"
                               ) from error

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # what it did not read
            self._sink.close()
        self._source.close()
