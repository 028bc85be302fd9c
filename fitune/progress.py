"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

REDRAW_SECONDS = 0.1


class Plain(ProgressColumn):
    """A column in the terminal's own colour, as rich's yellow times vanish on white; a time has a word beside it."""

    def __init__(self, column: ProgressColumn, word: str = ""):
        super().__init__(table_column=one_line())
        self.column, self.word = column, word

    def render(self, task) -> Text:
        return Text(f"{self.column.render(task).plain} {self.word}".rstrip())


def one_line() -> Column:
    """A cell that is not broken: where the terminal is narrow the bar gets shorter."""
    return Column(no_wrap=True)


@contextmanager
def bar(description: str, total: float, *, in_bytes: bool = False, show: bool = True) -> Iterator[Callable[..., None]]:
    """A bar of `total` steps, or bytes; call what it yields after each, or with their number.

    Of several ranks only one should `show` it.
    """
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        with _plain_lines(description, total, in_bytes) if show else _nothing() as advance:
            yield advance
        return
    sizes = (DownloadColumn, TransferSpeedColumn) if in_bytes else (MofNCompleteColumn,)
    size = [Plain(column()) for column in sizes]
    times = Plain(TimeElapsedColumn(), "elapsed"), Plain(TimeRemainingColumn(), "left")
    columns = TextColumn("{task.description}", table_column=one_line()), BarColumn(bar_width=None), *size, *times
    # drawn by the caller alone: a thread that draws on would look like progress to who watches for ranks that hang
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task, drawn = progress.add_task(description, total=total), 0.0

        def advance(*amount) -> None:
            nonlocal drawn
            now = time.monotonic()
            redraw = now - drawn > REDRAW_SECONDS
            progress.update(task, advance=amount[0] if in_bytes else 1, refresh=redraw)
            if redraw:
                drawn = now

        yield advance


@contextmanager
def _plain_lines(description: str, total: float, in_bytes: bool) -> Iterator[Callable[..., None]]:
    """What begins, and how long it took."""
    began = time.monotonic()
    print(f"{description}{f': {in_gb(total)}' if in_bytes else ''}", file=sys.stderr, flush=True)
    yield lambda *_: None
    print(f"{description}: {how_long(total, time.monotonic() - began, in_bytes)}", file=sys.stderr, flush=True)


@contextmanager
def _nothing() -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def how_long(total: float, seconds: float, in_bytes: bool) -> str:
    """As in `39.2 GB in 18.4 s, 2.1 GB/s`."""
    if not in_bytes:
        return f"{total:,.0f} in {seconds:.1f} s"
    speed = f", {in_gb(total / seconds)}/s" if seconds >= 0.1 else ""
    return f"{in_gb(total)} in {seconds:.1f} s{speed}"


def in_gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
