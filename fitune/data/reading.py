"""Reads every source with all cores: chunks out to the workers, checked rows back in order, bad rows named."""

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

from fitune.data import row_formats
from fitune.data.check_worker import check_in_worker, start_worker
from fitune.data.column_hints import hint_for
from fitune.data.conversations import RowError
from fitune.data.row_checks import EXAMPLES_PER_REASON, Checker, Outcome, Shape, parse_record
from fitune.data.row_store import RowStore
from fitune.data.rules import Rules
from fitune.data.source_file import SourceFile, file_sha256
from fitune.errors import FituneError, UsageError

SERIAL_BYTES = 4 << 20
"Below this, starting processes costs more than they save."


@dataclass
class Tally:
    """What was read so far, over all files."""

    rows_in: int = 0
    cut: int = 0
    escaped: int = 0
    reasoning_dropped: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    "by reason, `file:line: message`"
    rows_by_source: dict[int, int] = field(default_factory=dict)
    sha256_by_file: dict[str, str] = field(default_factory=dict)
    file_errors: list[str] = field(default_factory=list)
    "files that could not be read to their end"

    def add(self, outcome: Outcome, source: int, name: str, lines_before: int) -> None:
        self.rows_in += outcome.rows_in
        self.cut += outcome.cut
        self.escaped += outcome.escaped
        self.reasoning_dropped += outcome.reasoning_dropped
        self.rows_by_source[source] = self.rows_by_source.get(source, 0) + outcome.rows_in
        for reason, count in outcome.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for reason, number, message in outcome.examples:
            kept = self.examples.setdefault(reason, [])
            if len(kept) < EXAMPLES_PER_REASON:
                kept.append(f"{name}:{lines_before + number}: {message}")


def read_all(sources, rules: Rules, store: RowStore, workers: int, show_progress=None) -> Tally:
    """Every row of every source through the checks, the good ones into `store`, in order.

    `show_progress(rows_in, file_name)` is called after each chunk.
    """
    tally = Tally()
    files = [
        (number, source, file, is_test)
        for number, (source, splits) in enumerate(sources)
        for is_test, split in ((True, splits.test), (False, splits.train))
        for file in split
    ]
    system_message = sources[0][0].system_message
    with _pool(rules, workers, [file for _, _, file, _ in files]) as (submit, window):
        hashes = {file.name: submit(file_sha256, file.path) for _, _, file, _ in files if isinstance(file, SourceFile)}
        for number, source, file, is_test in files:
            lines_before = 0
            try:
                for chunk, outcome in _checked(file, source, system_message, submit, window):
                    tally.add(outcome, number, file.name, lines_before)
                    store.add(outcome, number, is_test)
                    lines_before += outcome.lines if chunk.counts_lines else 0
                    if show_progress:
                        show_progress(tally.rows_in, file.name)
            except UsageError as error:
                tally.file_errors.append(str(error))
        tally.sha256_by_file = {name: result() for name, result in hashes.items()}
    store.close()
    return tally


def refuse_problems(tally: Tally, rules: Rules, drop_invalid: bool) -> None:
    """One error that names the rows, unless they are to be dropped, and the files that cannot be read, in any case."""
    tolerated = {"not_kept"} | ({"too_long"} if rules.long_rows != "refuse" else set())
    bad = {reason: count for reason, count in tally.counts.items() if reason not in tolerated}
    if drop_invalid or not bad:
        if tally.file_errors:
            raise UsageError("\n".join(tally.file_errors))
        return
    total = sum(bad.values())
    lines = [*tally.file_errors, f"{total:,} of {tally.rows_in:,} rows cannot be used; nothing was written"]
    for reason, count in sorted(bad.items(), key=lambda item: -item[1]):
        shown = tally.examples[reason]
        lines.append(f"{reason}: {count:,}" + (f", the first {len(shown)}:" if count > len(shown) else ""))
        lines += [f"  {example}" for example in shown]
    advice = ["fix them, or go on without them: --drop-invalid"]
    if "control_token" in bad:
        advice.append("keep those with control tokens, broken up by a space: --escape-control-tokens")
    if "too_long" in bad:
        advice.append("long rows: --long-rows drop, or --long-rows cut (after the last answer that fits)")
    raise UsageError("\n".join(lines + advice))


def _checked(file, source, system_message, submit, window: int) -> Iterator[tuple]:
    """`(chunk, outcome)` in the file's order, with at most `window` chunks on their way, so memory stays bounded."""
    chunks = file.chunks()
    first = next(chunks, None)
    if first is None:
        return
    shape = _shape(first, source, system_message, file.name)
    pending = deque()
    broken_off = None
    chunks = itertools.chain([first], chunks)
    while True:
        try:
            chunk = next(chunks, None)
        except UsageError as error:
            chunk, broken_off = None, error
        if chunk is not None:
            pending.append((chunk, submit(check_in_worker, chunk, shape)))
        while pending and (chunk is None or len(pending) >= window):
            checked, result = pending.popleft()
            yield checked, result()
        if broken_off:
            raise broken_off
        if chunk is None:
            return


def _shape(chunk, source, system_message: str | None, name: str) -> Shape:
    """What the rows of a file look like, by its first ones. Raises UsageError for preference data."""
    unread = Shape(
        format=source.format or "messages",
        system_message=system_message,
        columns=source.columns,
        keep=source.keep,
        ignored_keys=tuple(source.ignored_keys),
        format_is_named=source.format is not None,
    )
    for number, row in _objects(chunk):
        try:
            unread.refuse_preferences(unread.without_ignored(row))
        except RowError as error:
            raise UsageError(f"{name}:{number}: {error}") from None
        break  # one line tells what the file is; of later rows each is named
    return unread if source.format else replace(unread, format=_find_format(chunk, source, name))


def _objects(chunk) -> Iterator[tuple[int, dict]]:
    """`(number, row)` of those that are objects."""
    for number, record in chunk.records():
        try:
            yield number, parse_record(record)
        except RowError:
            continue


def _find_format(chunk, source, name: str) -> str:
    """The format of the first row that has one; `messages` where no row is an object, so that each is named.

    A file is one of texts only where no row is a conversation: a column `text` may stand beside many things.
    """
    first = text = None
    for number, row in _objects(chunk):
        found = row_formats.detect_format(row_formats.rename_columns(row, source.columns))
        if found and found != "text":
            return found
        text = text or found
        first = first or (number, row)
    if first is None or text:
        return text or "messages"
    columns = ", ".join(map(repr, first[1])) or "(none)"
    raise UsageError(f"{name}:{first[0]}: no known format has the columns {columns}; {hint_for(first[1])}")


@contextmanager
def _pool(rules: Rules, workers: int, files: list):
    """`(submit, window)`: submit(function, *args) returns a function that waits for the result."""
    sizes = [file.path.stat().st_size if isinstance(file, SourceFile) else SERIAL_BYTES for file in files]
    if workers == 1 or sum(sizes) < SERIAL_BYTES:
        checker = Checker(rules)
        yield lambda function, *args: _done(checker.check if function is check_in_worker else function, *args), 1
        return
    start_method = "fork" if hasattr(os, "fork") else "spawn"
    pool = ProcessPoolExecutor(workers, get_context(start_method), initializer=start_worker, initargs=(rules,))
    try:
        with _interrupts_held_back():
            pool.submit(os.getpid)  # forks all workers
        yield lambda function, *args: pool.submit(function, *args).result, 2 * workers
    except BrokenProcessPool:
        raise FituneError(
            "a worker process died, most likely killed for want of memory; try fewer with --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back():
    """A Ctrl-C is raised after the block: within a fork Python prints it and goes on. Workers ignore it anyway."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(function, *args):
    result = function(*args)
    return lambda: result
