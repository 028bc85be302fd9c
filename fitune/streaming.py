"""Reads byte ranges of a checkpoint ahead of their use: threads fill buffers while earlier ones are consumed."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fitune.checkpoint import Checkpoint

CHUNK_BYTES = 64 * 2**20
THREADS = 4
"""Reads in flight. Each holds one buffer: 256 MiB of host RAM, half a layer of the 70B model in NF4."""
PIN_FROM_BYTES = 2**20


@dataclass
class Read:
    """Bytes [start, stop) of tensor `source`, at most CHUNK_BYTES, into `destination` or handed to `consume`.

    `consume` gets them as uint8 on the CPU, in the order of the reads; the memory is reused when it returns.
    """

    source: str
    start: int
    stop: int
    consume: Callable[[torch.Tensor], object] | None = None
    destination: torch.Tensor | None = None


def stream(
    checkpoint: Checkpoint, reads: Iterable[Read], pin_memory: bool, on_read: Callable[[], None] = lambda: None
) -> None:
    """Carries out `reads`, `on_read` after each. Pinned buffers let the copy to a GPU run at the link's speed."""
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pin_memory) for _ in range(THREADS)]
    in_flight: deque[tuple[Read, Future, torch.Tensor | None]] = deque()

    def finish_oldest() -> None:
        read, future, buffer = in_flight.popleft()
        data = future.result()
        if read.consume:
            read.consume(data)
            buffers.append(buffer)
        on_read()

    with ThreadPoolExecutor(THREADS) as pool:
        for read in reads:
            while len(in_flight) >= THREADS or (read.consume and not buffers):
                finish_oldest()
            buffer = buffers.pop() if read.consume else None
            target = buffer[: read.stop - read.start] if read.consume else read.destination
            future = pool.submit(checkpoint.read_bytes, read.source, read.start, read.stop, target)
            in_flight.append((read, future, buffer))
        while in_flight:
            finish_oldest()


def pin_in_place(tensor: torch.Tensor) -> None:
    """Page-locks a large CPU tensor where it is, so that FSDP copies it to the GPU asynchronously.

    `Tensor.pin_memory()` would copy it into an allocation rounded up to a power of two: 12 % more host RAM for the 70B
    model. Small tensors may share a page with a neighbour; FSDP pins those in its own way.
    """
    if tensor.device.type == "cpu" and tensor.nbytes >= PIN_FROM_BYTES and not tensor.is_pinned():
        code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(code) != 0:
            raise RuntimeError(f"page-locking {tensor.nbytes} bytes of host RAM failed: {code}")
