"""Host RAM that a GPU reads and writes beside its computing: page-locked memory, and a stream for each direction."""

import math
import weakref

import torch

from fitune.errors import FituneError

PIN_FROM_BYTES = 2**20


def pin_in_place(tensor: torch.Tensor) -> None:
    """Page-locks a large CPU tensor's storage where it is, so that it is copied to the GPU asynchronously.

    `Tensor.pin_memory()` would copy it into an allocation rounded up to a power of two: 12 % more host RAM for the 70B
    model. Small tensors may share a page with a neighbour; FSDP pins those in its own way. The lock ends with the
    storage: CUDA would refuse copies from memory that is used again and locked in part.
    """
    if tensor.device.type == "cpu" and tensor.nbytes >= PIN_FROM_BYTES and not tensor.is_pinned():
        storage = tensor.untyped_storage()
        cuda = torch.cuda.cudart()
        code = cuda.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)
        if int(code) != 0:
            raise FituneError(
                f"page-locking {storage.nbytes() / 2**30:.2f} GiB of host RAM failed (CUDA's error {int(code)}): "
                "free RAM on this machine, or take a profile without offload"
            )
        unlock = weakref.finalize(storage, cuda.cudaHostUnregister, storage.data_ptr())
        unlock.atexit = False  # the process ends its locks itself


def host_zeros(shape: tuple[int, ...], dtype: torch.dtype, beside: torch.device) -> torch.Tensor:
    """Host RAM, page-locked where `beside`, the device it is for, is a GPU: by its size, but for small tensors.

    All of it must be: a copy from or to other memory would have Python wait for the GPU.
    """
    on_gpu, size = beside.type == "cuda", dtype.itemsize * math.prod(shape)
    tensor = torch.zeros(shape, dtype=dtype, pin_memory=on_gpu and size < PIN_FROM_BYTES)
    if on_gpu:
        pin_in_place(tensor)
    return tensor


class HostLink:
    """Two streams beside the one that computes, so that both directions of the link are busy at once.

    Python never waits: events say which stream waits for which. On the CPU, where tests run, the same happens without
    streams and events.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self.on_gpu else [None, None]

    def inwards(self):
        """A context: what is queued in it goes to the GPU."""
        return torch.cuda.stream(self._streams[0])  # of None: nothing changes

    def outwards(self):
        return torch.cuda.stream(self._streams[1])

    def event(self):
        """Records one on the stream in use."""
        return torch.cuda.current_stream(self.device).record_event() if self.on_gpu else None

    def wait(self, event) -> None:
        """Lets the stream in use wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """Waits until everything that was queued is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
