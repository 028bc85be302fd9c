"""The launcher's terminal while a run trains: its live line at the bottom, all that anybody prints above it.

Ranks, libraries in them and this process write where they like, even in the middle of a line. So while the live line is
shown, what they take for the terminal is a pipe; whole lines from it are printed, and the live line is drawn again. The
launcher draws, not a rank: it has something to say before the first rank has imported torch, and while a rank hangs.
"""

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console

from fitune.environment import OUTPUT
from fitune.launching.live_line import live_line
from fitune.launching.run_status import RunStatus

REDRAW_SECONDS = 0.5
READ_BYTES = 65536
CLEAR_LINE = "\r\x1b[2K"
STDOUT, STDERR = 1, 2
COLUMNS = 80
"Of a terminal that does not say how wide it is."


Show = Callable[[str, Callable[[], RunStatus | None]], None]
"Called with what begins now and a function that returns the run's status, None until a rank has told one."


@contextmanager
def run_shown(*, live: bool = True, quiet: bool = False) -> Iterator[Show]:
    """Shows a run: its live line where stderr is a terminal, else plain lines, if `quiet` nothing.

    Processes that are started meanwhile know from the environment what is shown.
    """
    terminal = Console(stderr=True)
    drawn = live and terminal.is_terminal and not terminal.is_dumb_terminal and not quiet
    with _told_in_the_environment("quiet" if quiet else "live" if drawn else ""):
        if not drawn:
            yield lambda doing, _: None if quiet else print(doing, file=sys.stderr, flush=True)
            return
        screen = LiveScreen()
        screen.start()
        try:
            yield screen.show
        finally:
            screen.stop()


@contextmanager
def _told_in_the_environment(output: str) -> Iterator[None]:
    before = os.environ.get(OUTPUT)
    os.environ[OUTPUT] = output
    try:
        yield
    finally:
        if before is None:
            del os.environ[OUTPUT]
        else:
            os.environ[OUTPUT] = before


class LiveScreen(threading.Thread):
    """From `start` to `stop` stdout and stderr, where they are terminals, are pipes, which this thread prints from."""

    def __init__(self):
        super().__init__(daemon=True)
        self.terminal = os.dup(STDERR)
        self.console = Console(file=open(self.terminal, "w", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
        self.source: Callable[[], RunStatus | None] = lambda: None
        self._over = threading.Event()
        self._pipes = {}
        "Read end -> (file descriptor that it stands for, a copy of what that was, bytes of an unfinished line)."

    def show(self, doing: str, told: Callable[[], RunStatus | None]) -> None:
        newest = RunStatus()
        newest.begin(doing)

        def source() -> RunStatus:
            nonlocal newest
            newest = told() or newest
            return newest

        self.source = source

    def start(self) -> None:
        for number, stream in ((STDOUT, sys.stdout), (STDERR, sys.stderr)):
            stream.flush()
            if os.isatty(number):
                reading, writing = os.pipe()
                os.set_blocking(reading, False)
                self._pipes[reading] = number, os.dup(number), bytearray()
                os.dup2(writing, number)
                os.close(writing)
        super().start()

    def run(self) -> None:
        drawn = 0.0
        while not self._over.is_set():
            readable = select.select(list(self._pipes), [], [], REDRAW_SECONDS)[0]
            lines = [line for pipe in readable for line in self._lines(pipe)]
            if lines or time.monotonic() - drawn > REDRAW_SECONDS:
                self._draw(lines)
                drawn = time.monotonic()

    def stop(self) -> None:
        """Prints what is left, removes the live line and gives stdout and stderr back."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._over.set()
        self.join()
        for number, original, _ in self._pipes.values():
            os.dup2(original, number)
            os.close(original)
        self.source = lambda: None
        self._draw([line for pipe in self._pipes for line in self._lines(pipe, last=True)])
        for pipe in self._pipes:
            os.close(pipe)
        os.close(self.terminal)

    def _lines(self, pipe: int, last: bool = False) -> list[str]:
        """Whole lines that came through; at the `last` time also the unfinished one. Of a bar only its last state."""
        unfinished = self._pipes[pipe][2]
        with suppress(BlockingIOError):
            while data := os.read(pipe, READ_BYTES):
                unfinished += data
        *whole, rest = bytes(unfinished).split(b"\n")
        unfinished[:] = b"" if last else rest
        whole += [rest] if last and rest else []
        return [line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in whole]

    def _draw(self, lines: list[str]) -> None:
        """One write, so that nothing flickers. A terminal that was closed ends nothing: the run has yet to be saved."""
        with suppress(OSError):
            data = (CLEAR_LINE + "".join(f"{line}\n" for line in lines) + self._rendered()).encode()
            while data:
                data = data[os.write(self.terminal, data) :]

    def _rendered(self) -> str:
        status = self.source()
        if status is None:
            return ""
        columns = os.get_terminal_size(self.terminal).columns or COLUMNS
        width = columns - 1  # in the last column some terminals begin a new line
        self.console.width = width
        line = live_line(status, time.monotonic(), width, ascii_only=self.console.options.ascii_only)
        with self.console.capture() as captured:
            self.console.print(line, end="", no_wrap=True)
        return captured.get()
