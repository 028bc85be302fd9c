"""Reads byte ranges of a checkpoint ahead of their use: threads fill buffers while earlier ones are consumed."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fitune.config.read_buffers import CHUNK_BYTES, READ_BUFFERS
from fitune.weights.safetensors_files import Checkpoint

THREADS = 8
STEPS_AHEAD = 64
"Enough that small reads never leave the disk idle."


@dataclass
class Read:
    """Bytes [start, stop) of tensor `source` into `destination` or, at most CHUNK_BYTES of them, into `consume`.

    `consume` gets them as uint8 on the CPU; the memory is reused when it returns.
    """

    source: str
    start: int
    stop: int
    consume: Callable[[torch.Tensor], object] | None = None
    destination: torch.Tensor | None = None


Step = Read | Callable[[], None]
"A read, or a call to make once the steps before it are done."


def stream(
    checkpoint: Checkpoint, steps: Iterable[Step], pin_memory: bool, on_step: Callable[[], None] = lambda: None
) -> None:
    """Carries out `steps`, `on_step` after each; reads ahead, but consumes and calls in their order.

    A call is made as soon as the steps before it are done, never after reads behind it. In some calls ranks wait for
    each other, and those reads may not have begun on another rank.
    Pinned buffers let the copy to a GPU run at the link's speed.
    """
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pin_memory) for _ in range(READ_BUFFERS)]
    begun: deque[tuple[Step, Callable[[], None]]] = deque()

    def begin(read: Read) -> Callable[[], None]:
        """What ends it: waits for the bytes and hands them on."""
        buffer = buffers.pop() if read.destination is None else None
        target = read.destination if buffer is None else buffer[: read.stop - read.start]
        future = pool.submit(checkpoint.read_bytes, read.source, read.start, read.stop, target)

        def end() -> None:
            data = future.result()
            if buffer is not None:
                read.consume(data)
                buffers.append(buffer)

        return end

    def end_oldest() -> None:
        _, end = begun.popleft()
        end()
        on_step()

    def must_end_one() -> bool:
        is_call = begun and not isinstance(begun[0][0], Read)
        return is_call or len(begun) >= STEPS_AHEAD or not buffers

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for step in steps:
                begun.append((step, begin(step) if isinstance(step, Read) else step))
                while must_end_one():
                    end_oldest()
            while begun:
                end_oldest()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error, or a signal, does not wait for what was to be read ahead
            raise
