"""run.lock: one run at a time in a folder. Held by `fitune train`, or by rank 0 where another launcher is used."""

import fcntl
import json
import os
import socket
from pathlib import Path

from fitune.errors import UsageError

LOCK = "run.lock"
HELD = "FITUNE_RUN_LOCK_HELD"
"The environment variable by which `fitune train` tells its ranks that it holds the lock."


def is_held_by_launcher() -> bool:
    return HELD in os.environ


class RunLock:
    """An flock on FOLDER/run.lock, which names its holder. The kernel releases it when the process ends, however.

    As a context manager it is a launcher's, and released at the end.
    """

    def __init__(self, folder: Path):
        """Raises UsageError if another process holds it, or one on another host may, where the kernel cannot tell."""
        self.file = folder / LOCK
        self._stream = self.file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: {_named(self._holder())} trains here; wait for it or stop it") from None
        holder = self._holder()
        if holder and holder.get("host") != socket.gethostname():
            raise UsageError(
                f"{folder}: {_named(holder)} may train here; if it is gone, delete {self.file} and try again"
            )
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))

    def __enter__(self):
        os.environ[HELD] = str(os.getpid())
        return self

    def __exit__(self, *_):
        del os.environ[HELD]
        self.release()

    def release(self) -> None:
        self._write("")
        self._stream.close()

    def _holder(self) -> dict:
        self._stream.seek(0)
        try:
            return json.loads(self._stream.read() or "{}")
        except ValueError:
            return {}

    def _write(self, text: str) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self._stream.write(text)
        self._stream.flush()


def _named(holder: dict) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
