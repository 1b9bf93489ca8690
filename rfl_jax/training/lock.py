"""One run in a folder: a lock that says who holds it, which a process that is gone does not keep."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rfl_jax import hosts
from rfl_jax.errors import RunError, UserError
from rfl_jax.files import is_remote, read_json, write_whole
from rfl_jax.runs import RunFolder

# How often the holder says that it lives.
BEAT_S = 10.0
# A holder on another host that says nothing for so long is gone.
SILENCE_S = 45.0
# What a lock says of its holder, and the largest number that Linux gives a process.
HOLDER = {"host": str, "pid": int, "born": str, "place": str, "token": str, "beat": int}
MOST_PROCESSES = 1 << 22
# How long a process that takes a lock in a bucket waits for one that took it in the same moment.
SETTLE_S = 3.0


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def place() -> str:
    """Where process numbers mean something: this boot of this machine, and the container in it."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{_read(Path('/proc/sys/kernel/random/boot_id'))} {namespace}"


def born(pid: int) -> str:
    """When a process began, which tells it from a later one of its number; empty if there is none or it is not known."""
    # The fields after the command's name, which may hold anything; the 22nd of all.
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether it is known that a lock's holder is gone."""
    if holder["host"] != socket.gethostname() or holder["place"] != place():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return holder["born"] != born(holder["pid"])


class Lock:
    """Holds a run's folder for this process from `with` to its end; on several hosts process 0 holds it for all.

    Args:
        folder: of the run.
        beat_s: how often the holder says that it lives.
        silence_s: after which a holder that cannot be asked is gone.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: RunFolder, *, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> None:
        self._folder, self._file = folder, folder.lock
        self._beat_s, self._silence_s = beat_s, silence_s
        pid = os.getpid()
        self._me = {
            "host": socket.gethostname(),
            "pid": pid,
            "born": born(pid),
            "place": place(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": secrets.token_hex(8),
        }
        self._beats = 0
        self._heard = 0.0
        self._ended = threading.Event()
        self._taken = ""
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def __enter__(self) -> "Lock":
        refusal = self._take() if hosts.is_writer() else ""
        # Process 0 may have watched a holder for a while.
        hosts.wait("lock")
        if hosts.any_host(bool(refusal)):
            raise UserError(refusal or f"{self._folder}: another run holds it, as process 0 says")
        if hosts.is_writer():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._thread.is_alive():
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a bucket that is away: a lock that is left is found to be dead
            if self._holder().get("token") == self._me["token"]:
                self._file.unlink()

    def check(self) -> None:
        """Raises:
        RunError: another run took the folder, as this one was silent for too long.
        """
        # A process that slept looks before it writes anything.
        if self._thread.is_alive() and time.monotonic() - self._heard > self._silence_s / 2:
            # A bucket that is away can neither be taken nor be written to.
            with contextlib.suppress(Exception):
                self._beat()
        if self._taken:
            raise RunError(f"{self._folder}: {self._taken} took it while this run was silent; nothing more is written")

    def _take(self) -> str:
        """Takes the lock. Returns who holds it instead, empty if nobody."""
        holder = self._holder()
        if holder and not is_dead(holder) and not self._falls_silent(holder):
            return self._refusal(self._holder() or holder)
        with self._alone():
            now = self._holder()
            # Somebody else was waiting as well.
            if now and now.get("token") != holder.get("token"):
                return self._refusal(now)
            self._write()
        if is_remote(self._file):
            time.sleep(SETTLE_S)
        now = self._holder()
        return "" if now.get("token") == self._me["token"] else self._refusal(now)

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"--workdir: {self._folder}: {self._name(holder)} trains here since {holder.get('since', '?')}, expected a "
            "folder of its own, or the end of that run"
        )

    @staticmethod
    def _name(holder: dict[str, Any]) -> str:
        return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"

    def _falls_silent(self, holder: dict[str, Any]) -> bool:
        """Watches a holder whose process cannot be asked. Returns whether it says nothing for `silence_s`."""
        if holder["host"] == self._me["host"] and holder["place"] == self._me["place"]:
            return False
        print(f"waiting whether {self._name(holder)}, which trains in {self._folder}, is still there", file=sys.stderr)
        begin = time.monotonic()
        while time.monotonic() - begin < self._silence_s:
            time.sleep(self._beat_s / 2)
            now = self._holder()
            if not now:
                return True
            if (now["token"], now["beat"]) != (holder["token"], holder["beat"]):
                return False
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process of this machine at a time looks and writes; a bucket has nothing of the kind, nor do all shared
        disks.
        """
        if is_remote(self._file):
            yield
            return
        descriptor = os.open(self._folder.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _holder(self) -> dict[str, Any]:
        """What the lock says; empty if there is none."""
        try:
            found = read_json(self._file)
        except FileNotFoundError:
            return {}
        except UserError:  # of something else, which nobody writes any more
            return {}
        written = {name: kind for name, kind in HOLDER.items() if type(found.get(name)) is kind}
        return found if written == HOLDER and 0 < found["pid"] < MOST_PROCESSES else {}

    def _write(self) -> None:
        self._beats += 1
        write_whole(self._file, json.dumps(self._me | {"beat": self._beats}, indent=1) + "\n")
        self._heard = time.monotonic()

    def _beat(self) -> None:
        with self._alone():
            holder = self._holder()
            if holder.get("token", self._me["token"]) == self._me["token"]:
                self._write()
            else:
                self._taken = self._name(holder)

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_s) and not self._taken:
            # A full disk or a bucket that is away: the next beat tries again, and a watcher sees as little.
            with contextlib.suppress(Exception):
                self._beat()
