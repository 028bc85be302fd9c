"""Signals that reach the launcher: it passes them on to its ranks, which finish or leave, and a second ends them."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from fitune.errors import FituneError, say_while_training

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def passed_on_to_ranks(module: str, is_saving: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
    """SIGTERM, Ctrl-C, a closed terminal: processes that run `module` get SIGTERM, at the second signal SIGKILL.

    Before there are any, KeyboardInterrupt is raised. `is_saving`: whether they finish a step first, which may take
    minutes and is said; those that were to do so have ended by themselves once there are none. What is ignored, as
    SIGHUP under nohup, stays ignored. Yields the signals received.
    """
    received: list[int] = []

    def forward(number, frame) -> None:
        received.append(number)
        ranks = _processes_of(module)
        if not ranks:
            if is_saving():
                return
            raise KeyboardInterrupt
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)
        if len(received) > 1:
            say_while_training(f"{signal.Signals(number).name}: stopped")
        elif is_saving():
            say_while_training(
                f"{signal.Signals(number).name}: finishing the step and saving it; once more to stop at once"
            )

    numbers = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    with _handled_by(forward, numbers):
        yield received


@contextmanager
def interrupts_passed_on(module: str) -> Iterator[None]:
    """Ctrl-C, each time: processes in a session of their own, as torch's launcher starts them, miss it otherwise."""

    def forward(number, frame) -> None:
        ranks = _processes_of(module)
        if not ranks:
            raise KeyboardInterrupt
        for rank in ranks:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(rank.pid) != os.getsid(0):
                    rank.send_signal(number)

    with _handled_by(forward, [signal.SIGINT]):
        yield


@contextmanager
def ignored() -> Iterator[None]:
    """SIGTERM, Ctrl-C and a closed terminal change nothing."""
    with _handled_by(signal.SIG_IGN, list(PASSED_ON)):
        yield


@contextmanager
def _handled_by(handler: Callable | signal.Handlers, numbers: list[int]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Killed:
    """The launcher's processes that run `module`, once they were killed for a reason."""

    def __init__(self, module: str):
        self.module = module
        self.pids: set[int] = set()
        self.reason: FituneError | None = None

    def end_ranks(self, reason: FituneError) -> None:
        self.reason = reason
        for rank in _processes_of(self.module):
            self.pids.add(rank.pid)
            with suppress(psutil.NoSuchProcess):
                rank.kill()


def _processes_of(module: str) -> list[psutil.Process]:
    """The launcher's children that run `module`; others help the launcher itself."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if module in child.cmdline():
                found.append(child)
    return found
