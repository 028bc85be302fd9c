"""Files that a living process touches every few seconds, so that processes on other hosts see that it lives.

Hosts' clocks differ, so times are compared as the shared disk gives them: with a file made at the moment.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

BEAT_SECONDS = 5
LOST_SECONDS = 120
"Without a sign of life for so long a process is gone: NFS may show times that are a minute old."


class SignsOfLife(threading.Thread):
    """Touches `file` until it is stopped. `lost()` is called once if the file is no longer this process's."""

    def __init__(self, file: Path, is_ours: Callable[[], bool], lost: Callable[[], None]):
        super().__init__(daemon=True)
        self.file, self.is_ours, self.lost = file, is_ours, lost
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                if not self.is_ours():
                    self.lost()
                    return
                os.utime(self.file)
            except OSError:
                continue  # the disk is away; whoever watches cannot see it either

    def stop(self) -> None:
        self._over.set()
        if self.is_alive():
            self.join()


def seconds_silent(file: Path) -> float:
    """Since `file` was last touched, by the clock of the disk it lies on. Raises OSError."""
    clock = file.with_name(f".{file.name}.{os.uname().nodename}-{os.getpid()}.clock")
    clock.touch()
    try:
        now = clock.stat().st_mtime
    finally:
        clock.unlink(missing_ok=True)
    with file.open("rb") as opened:  # NFS looks at a file anew when it is opened
        return now - os.fstat(opened.fileno()).st_mtime
