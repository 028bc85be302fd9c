"""run.lock: one run at a time in a folder. Held by `fitune train`, or by rank 0 where another launcher is used."""

import fcntl
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from fitune.environment import LOCK_HELD
from fitune.errors import UsageError, say_while_training
from fitune.launching.signs_of_life import BEAT_SECONDS, LOST_SECONDS, SignsOfLife, seconds_silent

LOCK = "run.lock"


def is_held_by_launcher() -> bool:
    return LOCK_HELD in os.environ


class RunLock:
    """An flock on FOLDER/run.lock, which names its holder. The kernel releases it when the process ends, however.

    Where another host's kernel does not tell (NFS without locks), the holder's signs of life do: it touches the file
    every few seconds. As a context manager it is a launcher's, and released at the end.
    """

    def __init__(self, folder: Path):
        """Raises UsageError if another process holds it, on this host or on one that shares the disk."""
        self.file = folder / LOCK
        self._stream = self.file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: {_named(self._holder())} trains here; wait for it or stop it") from None
        holder = self._holder()
        if holder and holder.get("kernel") != _this_kernel():
            self._wait_until_gone(holder)
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "kernel": _this_kernel()}
        self._mine = json.dumps(mine | {"alive_within": LOST_SECONDS})
        self._write(self._mine)
        self._signs = SignsOfLife(self.file, self._is_ours, self._lost)
        self._signs.start()

    def __enter__(self):
        os.environ[LOCK_HELD] = str(os.getpid())
        return self

    def __exit__(self, *_):
        del os.environ[LOCK_HELD]
        self.release()

    def release(self) -> None:
        self._signs.stop()
        self._write("")
        self._stream.close()

    def _wait_until_gone(self, holder: dict) -> None:
        """Raises UsageError if a holder on another host shows that it lives, or is of a version that gives no signs."""
        folder, patience = self.file.parent, holder.get("alive_within")
        if not patience:
            raise UsageError(
                f"{folder}: {_named(holder)} may train here; if it is gone, delete {self.file} and try again"
            )
        before = silent = seconds_silent(self.file)
        if silent <= patience:
            print(f"{folder}: {_named(holder)} may train here: looking for signs of life", file=sys.stderr)
        while silent <= patience:
            time.sleep(BEAT_SECONDS / 5)
            silent = seconds_silent(self.file)
            if silent < before or self._holder() != holder:
                raise UsageError(f"{folder}: {_named(holder)} trains here; wait for it or stop it")
            before = silent
        print(f"{folder}: {_named(holder)} is gone: no sign of life for {silent:.0f} s", file=sys.stderr)

    def _is_ours(self) -> bool:
        return self.file.read_text(encoding="utf-8") == self._mine

    def _lost(self) -> None:
        """Another host took this process for dead while it was suspended or had no disk: it must not write any more."""
        say_while_training(f"error: {self.file.parent}: {_named(self._holder())} took over while this process was away")
        os.kill(os.getpid(), signal.SIGKILL)  # its ranks end with it

    def _holder(self) -> dict:
        try:
            return json.loads(self.file.read_text(encoding="utf-8") or "{}")
        except (OSError, ValueError):
            return {}

    def _write(self, text: str) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self._stream.write(text)
        self._stream.flush()


def _this_kernel() -> str:
    """What tells hosts apart, as their names may not: the kernel's own name for the time since it started (Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _named(holder: dict) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
