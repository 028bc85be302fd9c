"""Gradients and optimizer states in page-locked host RAM, which visit the GPU piece by piece while it computes.

Backward: a hook takes each weight's gradient off the GPU as soon as it is there. Where an earlier pass of the step has
left one, that travels to the GPU first, the two are added there, and the sum goes back: no CPU adds anything. The step:
gradient, codes and scales of some rows travel in, the kernel runs, codes and scales travel out. Two streams, one each
way, so that both directions of the link are busy at once.

The streams share a ring of slots on the GPU. A slot's events say when it is full and when it is free, so Python never
waits, and no memory is taken on the way. On the CPU, where tests run, the same happens without streams.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fitune.config.optimizer_pieces import IN_FLIGHT_BYTES, PIECE, SLOTS
from fitune.model.sharding import local_part
from fitune.training.moment import Moment
from fitune.weights.streaming import PIN_FROM_BYTES, pin_in_place

BLOCK = 64
"The smallest one: a slot has room for the scales of as many blocks."


def host_zeros(shape: tuple[int, ...], dtype: torch.dtype, beside: torch.device) -> torch.Tensor:
    """Host RAM, page-locked where `beside`, the device it is for, is a GPU: by its size, but for small tensors.

    All of it must be: a copy from or to other memory would have Python wait for the GPU.
    """
    on_gpu, size = beside.type == "cuda", dtype.itemsize * math.prod(shape)
    tensor = torch.zeros(shape, dtype=dtype, pin_memory=on_gpu and size < PIN_FROM_BYTES)
    if on_gpu:
        pin_in_place(tensor)
    return tensor


class Slot:
    """Room on the GPU for PIECE elements: their gradients, the codes and scales of both moments."""

    def __init__(self, device: torch.device):
        self.gradient = torch.empty(PIECE, dtype=torch.bfloat16, device=device)
        self.values = [torch.empty(PIECE, dtype=torch.uint8, device=device) for _ in range(2)]
        self.scales = [torch.empty(PIECE // BLOCK, dtype=torch.float32, device=device) for _ in range(2)]
        self.full = self.free = None
        "Events."

    def moments(self, like: list[Moment]) -> list[Moment]:
        """Places for moments of these shapes."""
        return [
            Moment(_shaped(values, moment.values), _shaped(scales, moment.scales))
            for values, scales, moment in zip(self.values, self.scales, like, strict=True)
        ]


def _shaped(room: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return room[: like.numel()].view(like.shape)


@dataclass
class _Leaving:
    """A gradient that stays on the GPU until its copy is made."""

    gradient: torch.Tensor
    copied: torch.cuda.Event


class HostGradients:
    """The gradients of `parameters`, bf16, added up in host RAM over the passes of a step; those of `stay` don't go."""

    def __init__(self, parameters: list[torch.nn.Parameter], stay: list[torch.nn.Parameter]):
        self.device = local_part(parameters[0]).device
        self.of = {p: host_zeros(local_part(p).shape, torch.bfloat16, self.device) for p in parameters}
        "Parameter -> this rank's rows in host RAM, valid once the parameter is in `norms`."
        self.norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        "Of this rank's rows, float32 on the GPU; of the parameters that have a gradient in this step."
        self.ring = Ring(self.device)
        self._leaving: deque[_Leaving] = deque()
        self._written: dict[torch.nn.Parameter, torch.cuda.Event] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)
        for parameter in stay:
            parameter.register_post_accumulate_grad_hook(_set_apart)

    def forget(self) -> None:
        """Begins a new step."""
        self.norms.clear()

    @torch.no_grad()
    def _take(self, parameter: torch.nn.Parameter) -> None:
        gradient, host = local_part(parameter.grad), self.of[parameter]
        parameter.grad = None
        if not gradient.numel():
            self.norms[parameter] = torch.zeros((), device=gradient.device)
            return
        ring, ready = self.ring, self.ring.event()
        with ring.outwards():
            ring.wait(ready)
        if parameter in self.norms:
            with ring.inwards():
                ring.wait(self._written.get(parameter))
            self._add(gradient.view(-1), host.view(-1))
        with ring.outwards():
            self.norms[parameter] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            host.copy_(gradient, non_blocking=True)
            copied = self._written[parameter] = ring.event()
        if copied:
            self._leaving.append(_Leaving(gradient, copied))
            self._keep_few()

    def _add(self, gradient: torch.Tensor, host: torch.Tensor) -> None:
        """gradient += host, flat, piece by piece through the ring."""
        for start in range(0, len(host), PIECE):
            there, arriving = gradient[start : start + PIECE], host[start : start + PIECE]
            with self.ring.filling() as slot:
                slot.gradient[: len(arriving)].copy_(arriving, non_blocking=True)
            with self.ring.outwards():
                self.ring.wait(slot.full)
                there.add_(slot.gradient[: len(arriving)])
                slot.free = self.ring.event()

    def _keep_few(self) -> None:
        """Frees the oldest gradients beyond IN_FLIGHT_BYTES; what computes next waits until they are copied."""
        while len(self._leaving) > 1 and sum(one.gradient.nbytes for one in self._leaving) > IN_FLIGHT_BYTES:
            self.ring.wait(self._leaving.popleft().copied)

    def let_go(self) -> None:
        """Frees all gradients on the GPU; what computes next waits until they are copied."""
        while self._leaving:
            self.ring.wait(self._leaving.popleft().copied)

    def arrive(self) -> None:
        """What is queued from now on, on any stream, finds all gradients in host RAM."""
        self.let_go()
        for event in self._written.values():
            self.ring.wait(event)
            with self.ring.inwards():
                self.ring.wait(event)


@torch.no_grad()
def _set_apart(parameter: torch.nn.Parameter) -> None:
    """Copies a small gradient. FSDP's are parts of a unit's one buffer: a norm's would keep its layer's on the GPU."""
    mine = local_part(parameter.grad)
    if mine.untyped_storage().nbytes() > mine.nbytes:
        parameter.grad = parameter.grad.clone()


class Ring:
    """The slots, and the two streams beside the one that computes; on the CPU no streams and no events."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self._slots: deque[Slot] = deque()
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

    def filling(self) -> "_Filling":
        """A context on the stream inwards, whose value is the slot to fill, free by then."""
        if not self._slots:
            self._make_slots()
        self._slots.rotate(-1)
        return _Filling(self, self._slots[0])

    def _make_slots(self) -> None:
        """Their memory may be what the stream in use has freed and, being behind, still works on: the others wait."""
        self._slots.extend(Slot(self.device) for _ in range(SLOTS))
        ready = self.event()
        for stream in (self.inwards, self.outwards):
            with stream():
                self.wait(ready)

    def finish(self) -> None:
        """Waits until everything that was queued is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


class _Filling:
    def __init__(self, ring: Ring, slot: Slot):
        self.ring, self.slot, self.context = ring, slot, ring.inwards()

    def __enter__(self) -> Slot:
        self.context.__enter__()
        self.ring.wait(self.slot.free)
        return self.slot

    def __exit__(self, *error) -> None:
        self.slot.full = self.ring.event()
        self.context.__exit__(*error)


def stream_rows(
    ring: Ring, weight: torch.Tensor, gradient: torch.Tensor, moments: list[Moment], update: Callable
) -> None:
    """`update(weight, gradient, mean, root, first element)` on rows at a time: all but the weight lie in host RAM."""
    columns = weight[:1].numel()
    at_once = max(1, PIECE // max(columns, 1))
    for start in range(0, len(weight), at_once):
        here = [moment.rows(start, start + at_once) for moment in moments]
        arriving = gradient[start : start + at_once]
        with ring.filling() as slot:
            there = slot.moments(here)
            passing = _shaped(slot.gradient, arriving)
            passing.copy_(arriving, non_blocking=True)
            for room, moment in zip(there, here, strict=True):
                room.copy_from(moment)
        ring.wait(slot.full)
        update(weight[start : start + at_once], passing, *there, start * columns)
        done = ring.event()
        with ring.outwards():
            ring.wait(done)
            for room, moment in zip(there, here, strict=True):
                moment.copy_from(room)
            slot.free = ring.event()
