"""The batches of the next optimizer step, read while the GPU still computes this one's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


class ReadAhead:
    """Reads an epoch's steps in order by `read(batches, number, device)`, Trainer's `get_batch_samples`."""

    def __init__(self, read: Callable[[Iterator, int, torch.device], Any]):
        self.read = read
        self._asked: tuple | None = None
        self._next: Any = None
        self._in_use: Any = None
        "The step's own. Its memory is not to be taken for the next one's while the GPU computes with it."
        self._stream: torch.cuda.Stream | None = None

    def take(self, batches: Iterator, number: int, device: torch.device) -> Any:
        """The next step's of `batches`, an epoch's iterator; each step has the same `number`."""
        found = self._next if self._asked and self._asked[0] is batches else None
        self._asked, self._next = (batches, number, device), None
        self._in_use = self._read() if found is None else found
        if self._stream:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        return self._in_use

    def read_next(self) -> None:
        """To be called when the GPU has been given all of a step's work, while the epoch has another step."""
        if self._next is None:
            with self._beside_computing():
                self._next = self._read()

    def _read(self) -> Any:
        with _one_thread():
            return self.read(*self._asked)

    def _beside_computing(self):
        """A stream of its own: on the one that computes, each copy to the GPU waits until all of the step is done."""
        device = self._asked[2]
        if device is None or device.type != "cuda":
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream(device)
        return torch.cuda.stream(self._stream)


@contextmanager
def _one_thread():
    """For a row's few numbers: waking 64 threads took 14 ms of a batch, with the GPU idle."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
