"""Runs that are killed, stopped, refused a disk or damaged, and what becomes of them."""

import contextlib
import json
import os
import pathlib
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import to_dict

TESTS = pathlib.Path(__file__).parents[1]
PATIENCE_S = 600  # of a machine that others use, too


class Victims:
    """The process that forks runs; use as a context manager."""

    def __init__(self, folder):
        self.folder = folder
        self._ends, self._phases, self._started = {}, queue.Queue(), queue.Queue()
        self._ended = threading.Condition()

    def __enter__(self):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "ENGRAM_MESH": "1x1", "XLA_FLAGS": "",
               "ENGRAM_CACHE": str(self.folder / "cache"),
               "COMPILED": str(self.folder / "compiled"),
               "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false",
               "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        self._server = subprocess.Popen(
            [sys.executable, str(TESTS / "faults" / "victim.py")], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def _listen(self):
        for line in self._server.stdout:
            what, pid, *rest = line.split()
            if what == "started":
                self._started.put(int(pid))
            elif what == "phase":
                self._phases.put((int(pid), rest[0]))
            else:
                with self._ended:
                    self._ends[int(pid)] = int(rest[0])
                    self._ended.notify_all()

    def start(self, config, out, **order):
        """The number of a process that trains in `out`."""
        while not self._phases.empty():
            self._phases.get_nowait()
        self._server.stdin.write(json.dumps({
            "config": str(config), "out": str(out), "log": f"{out}.log", **order}) + "\n")
        self._server.stdin.flush()
        return self._started.get(timeout=PATIENCE_S)

    def reaches(self, pid, phase):
        """Wait until a process enters a phase; False if it ends before."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                if self._phases.get(timeout=0.02) == (pid, phase):
                    return True
            if pid in self._ends:
                return False
        raise TimeoutError(f"process {pid} does not get to {phase}")

    def pause(self, seconds, pid):
        """Wait, or until a process has ended: a machine that others use is now quick, now slow."""
        with self._ended:
            self._ended.wait_for(lambda: pid in self._ends, seconds)

    def end(self, pid):
        """The exit code of a process."""
        with self._ended:
            assert self._ended.wait_for(lambda: pid in self._ends, PATIENCE_S), f"{pid} hangs"
            return self._ends[pid]

    def ended(self, pid):
        return pid in self._ends


def signalled(pid, number):
    """Send a signal to a process that may have come to its end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kept(directory):
    """All that a run leaves which must not depend on what happened to it."""
    records = RunDirectory(directory)
    rows = [{name: value for name, value in row.items() if not name.startswith("perf/")}
            for row in records.metrics()]
    result = {name: value for name, value in records.result().items() if name != "tokens_per_s"}
    return rows, result


class Runs:
    """A run, how it goes undisturbed, and ways to disturb it; each tells of its outcomes.

    An outcome is "recovered" (bit for bit), "stopped" (cleanly, with one line) or a text that says
    how it was lost.
    """

    def __init__(self, victims, run, folder, seed=0):
        self.victims, self.folder = victims, folder
        self.draw = random.Random(seed)
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(to_dict(run)))
        self.count = 0
        for name in ("warm", "whole"):  # the first one compiles
            begin = time.monotonic()
            pid = victims.start(self.config, folder / name)
            assert victims.reaches(pid, "stepping")
            self.to_step_s = time.monotonic() - begin
            assert victims.end(pid) == 0, (folder / f"{name}.log").read_text()
            self.whole_s = time.monotonic() - begin
        self.expected = kept(folder / "whole")

    def new(self):
        self.count += 1
        return self.folder / f"run{self.count}"

    def stopped(self):
        """A copy of the whole run as it was before its end."""
        out = self.new()
        shutil.copytree(self.folder / "whole", out)
        (out / "result.json").unlink()
        return out

    def outcome(self, out, code=None, again=True):
        """What became of a run that was disturbed and ended with `code`."""
        log = pathlib.Path(f"{out}.log")
        if again and code != 0:
            code = self.victims.end(self.victims.start(self.config, out))
        lines = log.read_text().splitlines() if log.exists() else []
        if code != 0:
            clean = code in (1, 2) and not any("Traceback" in line for line in lines)
            return "stopped" if clean else f"{out}: exit code {code}: {lines[-3:]}"
        if kept(out) != self.expected:
            return f"{out}: is not the same"
        shutil.rmtree(out)
        return "recovered"

    def killed(self, number, phase=None, times=1, chain=4):
        """Kill runs, each up to `chain` times, at random or within 80 ms of entering a phase."""
        kills, outcomes = 0, []
        while kills < times:
            out, these, code = (self.stopped() if phase == "restoring" else self.new()), 0, 0
            if phase == "restoring":
                shutil.rmtree(out / "checkpoints" / max(
                    os.listdir(out / "checkpoints"), key=int))
            order = {"environment": {"ENGRAM_CACHE": f"{out}.cache"}} if phase == "packing" else {}
            while these < chain and kills + these < times:
                pid = self.victims.start(self.config, out, **order)
                if phase is None:
                    self.victims.pause(self.draw.uniform(self.to_step_s / 2, self.whole_s), pid)
                elif not self.victims.reaches(pid, phase):
                    code = self.victims.end(pid)
                    break
                else:
                    time.sleep(self.draw.choice([0, 0.005, 0.02, 0.08]) * self.draw.random())
                if self.victims.ended(pid):
                    code = self.victims.end(pid)
                    break
                signalled(pid, number)
                code = self.victims.end(pid)
                if code == 0:  # it was done before it heard
                    break
                these += 1
                if number == signal.SIGTERM and code not in (75, -signal.SIGTERM):
                    return [*outcomes, f"{out}: exit code {code} after SIGTERM"]
            outcomes += [self.outcome(out, code)] * these
            kills += these
            shutil.rmtree(f"{out}.cache", ignore_errors=True)
        return outcomes

    def full_disk(self, times):
        """No file may be longer than a random size, after which there is room again."""
        outcomes = []
        for _ in range(times):
            out = self.new()
            pid = self.victims.start(self.config, out, fsize=self.draw.choice(
                [100, 1000, 4000, 8000, 12_000, 16_000, 24_000, 40_000]))
            code = self.victims.end(pid)
            if code not in (0, 1):
                outcomes.append(f"{out}: exit code {code} with a full disk: "
                                f"{pathlib.Path(f'{out}.log').read_text()[-300:]}")
                continue
            outcomes.append(self.outcome(out, code))
        return outcomes

    def damaged_checkpoint(self, times):
        """A file of the newest checkpoint is changed, cut, emptied or removed."""
        outcomes = []
        for _ in range(times):
            out = self.stopped()
            newest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name))
            self.spoil(self.draw.choice(sorted(p for p in newest.rglob("*") if p.is_file())))
            outcomes.append(self.outcome(out))
        return outcomes

    def damaged_cache(self, times):
        """A file of what was made from the text is changed, cut, emptied or removed."""
        outcomes = []
        for _ in range(times):
            out = self.stopped()
            kind = self.draw.choice(["tokens", "tokens", "tokenizers", "texts"])
            cache = self.victims.folder / "cache" / kind
            self.spoil(self.draw.choice(sorted(p for p in cache.rglob("*") if p.is_file())))
            outcomes.append(self.outcome(out))
        return outcomes

    def text_away(self, times, text):
        """The text is not there, and then it is again."""
        outcomes = []
        for _ in range(times):
            out = self.stopped()
            os.rename(text, f"{text}.away")
            try:
                code = self.victims.end(self.victims.start(self.config, out))
            finally:
                os.rename(f"{text}.away", text)
            outcomes.append(self.outcome(out) if code in (1, 2) else f"{out}: exit code {code}")
        return outcomes

    def spoil(self, path):
        """Change, cut, empty or remove a file."""
        data = path.read_bytes()
        kind = self.draw.choice(["change", "cut", "empty", "remove"]) if data else "remove"
        if kind == "remove":
            path.unlink()
        elif kind == "change":
            at = self.draw.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << self.draw.randrange(8)])
                             + data[at + 1:])
        else:
            path.write_bytes(data[:self.draw.randrange(len(data))] if kind == "cut" else b"")


class Pairs(Runs):
    """Runs of two processes, of which one is killed or stopped."""

    def __init__(self, victims, run, folder, seed=0):
        self.victims, self.folder, self.draw, self.count = victims, folder, random.Random(seed), 0
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(to_dict(run)))
        for name in ("warm", "whole"):
            begin = time.monotonic()
            pids = self.pair(folder / name)
            assert victims.reaches(pids[0], "stepping")
            self.to_step_s = time.monotonic() - begin
            assert [victims.end(pid) for pid in pids] == [0, 0], (folder / "warm.log").read_text()
            self.whole_s = time.monotonic() - begin
        self.expected = kept(folder / "whole")

    def pair(self, out):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self.victims.start(
            self.config, out, environment={"ENGRAM_MESH": "2x1"},
            words=["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process",
                   str(number), "--timeout", "20"]) for number in (0, 1)]

    def killed(self, number, times=1):
        outcomes = []
        while len(outcomes) < times:
            out = self.new()
            pids = self.pair(out)
            if self.draw.random() < 0.3:
                self.victims.pause(self.draw.uniform(0, self.to_step_s), pids[0])
            elif self.victims.reaches(pids[0], "stepping"):
                self.victims.pause(self.draw.uniform(0, self.whole_s - self.to_step_s), pids[0])
            signalled(pids[self.draw.randrange(2)], number)
            codes = [self.victims.end(pid) for pid in pids]
            if codes == [0, 0]:
                continue
            if number == signal.SIGTERM and not self.in_order(codes):
                outcomes.append(f"{out}: exit codes {codes} after SIGTERM")
                continue
            codes = [self.victims.end(pid) for pid in self.pair(out)]
            outcomes.append(self.outcome(out, max(codes, key=abs), again=False))
        return outcomes

    @staticmethod
    def in_order(codes):
        """Both stopped, or were done; or one ended before it listened, and the other missed it."""
        early = -signal.SIGTERM in codes
        return set(codes) <= {0, 75, *([-signal.SIGTERM, 1] if early else [])}
