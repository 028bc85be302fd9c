"""Progress bars on stderr, from the main process only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from fitune.distributed import is_main_process


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar of `total` steps; call what it yields after each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_main_process()) as progress:
        task = progress.add_task(description, total=total)
        yield lambda *_: progress.advance(task)


def loading_bar(model: nn.Module):
    """A bar over the model's parameters."""
    return bar("loading weights", sum(1 for _ in model.parameters()))
