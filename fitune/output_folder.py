"""Builds a folder under another name and renames it at the end: whoever sees it sees all of it."""

import os
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from fitune.errors import FituneError, UsageError


def refuse_existing(output: Path, overwrite: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{output}: already exists; remove it, choose another folder, or pass --overwrite")
    if not (output / "report.json").is_file():
        raise UsageError(f"{output}: exists and was not written by prepare (no report.json); choose another folder")


@contextmanager
def built_aside(output: Path, overwrite: bool):
    """A folder next to `output` that takes its name once everything in it is written, and vanishes on any error."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        folder = output.with_name(f".{output.name}.partial-{os.getpid()}")
        folder.mkdir()
    except OSError as error:
        raise UsageError(f"{output}: cannot be written: {error.strerror}") from None
    try:
        with _interruptible():
            yield folder
        if overwrite and output.exists():
            output.rename(folder / "replaced")
        folder.rename(output)
        shutil.rmtree(output / "replaced", ignore_errors=True)
    except OSError as error:
        raise FituneError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _interruptible():
    """SIGTERM ends the work like Ctrl-C does, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_abandoned(output: Path) -> None:
    """What a killed prepare (SIGKILL, power) left: folders named after a process that is gone."""
    for folder in output.parent.glob(f".{output.name}.partial-*"):
        process = folder.name.rpartition("-")[2]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
