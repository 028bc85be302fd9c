"""The batches of the next optimizer step, read while the GPU still computes this one's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ReadAhead:
    """Reads an epoch's steps in order by `read(batches, number, device)`, Trainer's `get_batch_samples`."""

    def __init__(self, read: Callable[[Iterator, int, torch.device], Any]):
        self.read = read
        self._asked: tuple | None = None
        self._next: Any = None

    def take(self, batches: Iterator, number: int, device: torch.device) -> Any:
        """The next step's of `batches`, an epoch's iterator; each step has the same `number`."""
        found = self._next if self._asked and self._asked[0] is batches else None
        self._asked, self._next = (batches, number, device), None
        return self._read() if found is None else found

    def read_next(self) -> None:
        """To be called when the GPU has been given all of a step's work, while the epoch has another step."""
        if self._next is None:
            self._next = self._read()

    def _read(self) -> Any:
        with _one_thread():
            return self.read(*self._asked)


@contextmanager
def _one_thread():
    """For a row's few numbers: waking 64 threads took 14 ms of a batch, with the GPU idle."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
