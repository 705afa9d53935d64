"""One process at a time trains in a folder: a file `lock` in it says which one.

Whoever finds a lock asks whether its holder still lives. On the holder's own machine (the same
boot, the same process namespace) the system knows. Of a holder elsewhere only its beat is seen: it
touches the file every few seconds, and if nothing touches it for STALE_S it is taken for dead.

On a disk a lock is made whole or not at all. Object storage, as `epath` reaches it, cannot do that:
there the lock is written and read back, so two starts within the same second may both go on.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from engram_jax.distributed import is_first
from engram_jax.errors import MachineError, UserError
from engram_jax.settings import json_text
from engram_jax.storage import is_local, refusals

BEAT_S = 5.0
REMOTE_BEAT_S = 20.0  # of an object, which is written anew
STALE_S = 60.0
LOOK_S = 0.5
LOOKS = 3  # at a lock that cannot be read
SETTLE_S = 0.5  # after which a lock in object storage is read back


class Lock:
    """The right to train in a folder; use as a context manager. Process 0 holds it for all.

    Raises:
      UserError: somebody else trains there.
      MachineError: the lock cannot be written.
    """

    def __init__(self, folder: epath.Path, say: Callable[[str], None] = lambda line: None):
        self._path, self._say = folder / "lock", say
        self._local = is_local(folder)
        self._mine = {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid()),
                      "machine": _machine(), "token": secrets.token_hex(8)}
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._held = False

    def __enter__(self) -> "Lock":
        if is_first():
            with refusals(self._path, "written"):
                while not self._made():
                    self._pass_over(self._read())
            self._held = True
            self._beats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others in."""
        self._over.set()
        if not self._held:
            return
        self._beats.join(BEAT_S)  # a beat under way would write the lock anew
        if self._is_mine():
            # Whoever finds what cannot be removed will know that this process is gone.
            with contextlib.suppress(Exception):
                self._path.unlink()
        self._held = False

    def check(self) -> None:
        """Before something is written that another process would write, too.

        Raises:
          MachineError: this process was taken for dead, and another one trains here.
        """
        if self._held and not self._is_mine():
            self._held = False
            raise MachineError(f"{self._path}: another process trains here now; this one said "
                               f"nothing for over {STALE_S:g} s and was taken for dead")

    def _made(self) -> bool:
        """Make the lock; False where there is one."""
        text = self._text(0)
        if not self._local:
            if self._path.exists():
                return False
            self._path.write_text(text)
            time.sleep(SETTLE_S)
            return self._names_me()
        part = Path(self._path.parent) / f"lock.{self._mine['token']}.part"
        try:
            part.write_text(text)
            os.link(part, self._path)
        except FileExistsError:
            return self._names_me()  # NFS may say so of a link whose first answer was lost
        except OSError:  # a file system without links
            return self._made_in_place(text)
        finally:
            part.unlink(missing_ok=True)
        return True

    def _made_in_place(self, text: str) -> bool:
        try:
            with open(self._path, "x") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError:  # a full disk, on which an empty lock would be nobody's
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> str | None:
        """The lock's text; None where it is gone."""
        try:
            return self._path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return None

    def _text(self, beats: int) -> str:
        """The lock after so many beats: always of one length, for `epath` reads as much of an
        object as it had when it was opened, and a beat may fall between."""
        return json_text({**self._mine, "beat": f"{beats:09}"})

    def _names_me(self) -> bool:
        for _ in range(LOOKS):
            text = self._read()
            if text is None or _holder(text):
                break  # else it was read while another process wrote it, or is damaged
        return _holder(text).get("token") == self._mine["token"]

    def _is_mine(self) -> bool:
        try:
            return self._names_me()
        except Exception:  # a disk that is away says nothing about who trains
            return True

    def _pass_over(self, text: str | None) -> None:
        """Take away a lock whose holder is gone, or refuse."""
        if text is None:
            return
        holder = _holder(text)
        if holder.get("machine") == self._mine["machine"]:
            now = _started(holder.get("pid"))
            alive = (self._moves(holder) if now == "" != holder.get("started")
                     else now == holder.get("started"))
        else:
            alive = self._moves(holder)
        if alive:
            raise UserError(f"out = {str(self._path.parent)!r}: process {holder.get('pid')} on "
                            f"{holder.get('host')} trains there now; wait for its end, or choose "
                            "another folder")
        self._take_away(text)

    def _moves(self, holder: dict[str, Any]) -> bool:
        """Whether the lock of another machine's process is touched within STALE_S."""
        before = self._sign()
        self._say(f"{self._path}: of a process on {holder.get('host', 'an unknown machine')}; "
                  f"waiting up to {STALE_S:g} s for a sign of it")
        begin, over = time.monotonic(), False
        while not over:  # whatever held this process up, the last look comes after the wait
            time.sleep(LOOK_S)
            over = time.monotonic() - begin >= STALE_S
            if self._sign() != before:
                return self._read() is not None
        return False

    def _sign(self) -> object:
        if not self._local:
            return self._read()
        try:
            return os.stat(self._path).st_mtime_ns
        except FileNotFoundError:
            return None

    def _take_away(self, text: str) -> None:
        if not self._local:
            if self._read() == text:  # else it was let go, or another process was quicker
                self._path.unlink(missing_ok=True)
            return
        aside = Path(self._path.parent) / f"lock.{self._mine['token']}.stale"
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:  # somebody else was quicker
            return
        try:
            if aside.read_bytes().decode(errors="replace") != text:  # and has made a new one
                os.link(aside, self._path)
        except FileExistsError:
            pass
        finally:
            aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(BEAT_S if self._local else REMOTE_BEAT_S):
            count += 1
            try:
                if not self._is_mine():
                    return
                if self._local:
                    os.utime(self._path)
                else:
                    self._path.write_text(self._text(count))
                    if self._over.is_set():  # `release` has not waited for it
                        self._path.unlink()
            except Exception:  # a disk that is away for a while
                continue


def _holder(text: str | None) -> dict[str, Any]:
    """What a lock says of its holder; nothing where it is damaged."""
    try:
        values = json.loads(text or "")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _machine() -> str:
    """What tells this machine's processes from those of others that have the same numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return platform.node()


def _started(pid: object) -> str | None:
    """When a process of this machine began, in the system's own words; None where it is gone."""
    if type(pid) is not int or pid <= 0:
        return None
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if words[0] in "ZX" else words[19]  # a zombie is gone
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user, whom /proc may hide (hidepid)
        pass
    return ""
