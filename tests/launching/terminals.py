"""Programs in a pseudo-terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

from patience import PATIENCE_SECONDS
from quick_python import Program

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 80


def in_terminal(
    arguments: list, columns: int = COLUMNS, *, quickly: bool = False, **environment: str
) -> tuple[int, str]:
    """(exit code, raw output) of Python with these arguments, whose stdin, stdout and stderr are one terminal.

    `quickly`: with the libraries imported already.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment = inherited | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environment
    if quickly:
        process = Program(arguments, environment, ROOT, (theirs, theirs, theirs))
    else:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    data = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 65536):
                data.extend(part)
        except OSError:  # the other end is closed
            pass

    reading = threading.Thread(target=read)
    reading.start()
    code = process.wait(PATIENCE_SECONDS)
    reading.join()
    os.close(ours)
    return code, data.decode()


def left_on_screen(raw: str) -> list[str]:
    """The lines that a person sees in the end, without colours; only what this terminal code uses is understood."""
    raw = re.sub(r"\x1b\[[\d;]*m", "", raw).replace("\r\n", "\n")
    lines = [line.rpartition("\r\x1b[2K")[2] for line in raw.split("\n")]
    assert not any("\x1b" in line for line in lines), lines
    return lines
