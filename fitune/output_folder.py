"""Builds a folder under a temporary name beside its own and renames it at the end: whoever sees it sees all of it."""

import ctypes
import fcntl
import glob
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from fitune.errors import FituneError, UsageError

SMALL_FILES_BYTES = 2**26  # room for tokenizer, configs and licence


@contextmanager
def new_folder(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` once the block is through, and vanishes on any error, Ctrl-C or SIGTERM.

    Files are flushed to disk before the rename, so `output` is whole whenever it exists; modes follow the umask. What
    a killed process left of the same output is removed. An existing `output` is a UsageError, or with `replace` stays
    as it is until the rename. Raises UsageError too if the folder cannot be created, FituneError where the disk fails.
    """
    output = Path(output).absolute()
    if not replace:
        refuse_existing(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        unfinished = _temporary(output)
        unfinished.mkdir()
        lock = os.open(unfinished, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{output}: cannot be created: {error.strerror}; give another output") from None
    try:
        with _ended_by_sigterm():
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield unfinished
            rename_when_whole(unfinished, output, replace=replace)
    except OSError as error:
        raise FituneError(f"{output}: not written: {error}; nothing was left behind") from error
    finally:
        remove(unfinished)
        os.close(lock)


def write_whole(file: Path, text: str) -> None:
    """A small file in place of one that may be there: whoever reads it finds the old text or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise UsageError(f"{output}: exists already; give a new folder, nothing is overwritten")


def check_disk_space(output: Path, nbytes: int) -> None:
    """Raises FituneError if `nbytes` of weights, with the small files beside them, have no room at `output`."""
    parent = Path(output).absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = nbytes + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise FituneError(
            f"{output}: needs {needed / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free; "
            f"free some space or give an output on another disk"
        )


def rename_when_whole(unfinished: Path, output: Path, *, replace: bool) -> None:
    """Flushes `unfinished` to disk and names it `output`; with `replace`, what had that name is deleted after that.

    At no moment is there nothing of that name, where the file system can exchange two (Linux's renameat2).
    """
    for path in [*unfinished.rglob("*"), unfinished]:
        _flush(path)
    replaced = _temporary(output)
    if not replace:
        refuse_existing(output)
    elif os.path.lexists(output):
        if _exchange(unfinished, output):
            _flush(output.parent)
            remove(unfinished)
            return
        output.rename(replaced)
    try:
        unfinished.rename(output)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(output)
        raise
    _flush(output.parent)
    remove(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Gives each the other's name in one step; False where the C library or the file system cannot."""
    at_working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = at_working_folder, os.fsencode(one), at_working_folder, os.fsencode(other)
    return renameat2 is not None and renameat2(*paths, exchange) == 0


def checkpoints(folder: Path) -> list[Path]:
    """What bears a checkpoint's name under a run's checkpoints/ folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _temporary(output: Path) -> Path:
    """A name beside `output` that no other process or thread uses; it ends in this process's number."""
    return output.with_name(f".{output.name}.partial-{token_hex(4)}-{os.getpid()}")


def _remove_abandoned(output: Path) -> None:
    """What killed processes left of `output`.

    The number in the name says which process it was, and that the process is gone. In another container or on another
    host the number means nothing, so the kernel must have released the folder's lock as well.
    """
    for folder in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        process = folder.name.rpartition("-")[2]
        if process.isdecimal() and not _is_another_process(int(process)):
            _remove_if_unlocked(folder)


def _is_another_process(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return number != os.getpid()


def _remove_if_unlocked(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def remove(path: Path) -> None:
    """A folder with all in it, a file, or a link; nothing if there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, unless someone handles it already, ends the block like Ctrl-C does: what was begun is cleaned up."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
