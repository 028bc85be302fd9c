"""Progress bars on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REDRAW_SECONDS = 0.1


@contextmanager
def bar(description: str, total: int, *, show: bool = True) -> Iterator[Callable[..., None]]:
    """A bar of `total` steps; call what it yields after each. Of several ranks only one should `show` it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # drawn by the caller alone: a thread that draws on would look like progress to who watches for ranks that hang
    options = {"console": Console(stderr=True), "disable": not show, "auto_refresh": False}
    with Progress(*columns, **options) as progress:
        task, drawn = progress.add_task(description, total=total), 0.0

        def advance(*_) -> None:
            nonlocal drawn
            now = time.monotonic()
            redraw = now - drawn > REDRAW_SECONDS
            progress.update(task, advance=1, refresh=redraw)
            if redraw:
                drawn = now

        yield advance
