"""Gradients and optimizer states in page-locked host RAM, which visit the GPU piece by piece while it computes.

Backward: a hook takes each weight's gradient off the GPU as soon as it is there. Where an earlier pass of the step has
left one, that travels to the GPU first, the two are added there, and the sum goes back: no CPU adds anything. The step:
gradient, codes and scales of some rows travel in, the kernel runs, codes and scales travel out. How they travel:
`fitune.optimizers.ring`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fitune.config.optimizer_pieces import IN_FLIGHT_BYTES, PIECE
from fitune.model.host_ram import host_zeros
from fitune.model.sharding import local_part
from fitune.optimizers.moment import Moment
from fitune.optimizers.ring import Ring, Slot

BLOCK = 64
"The smallest one: a slot has room for the scales of as many blocks."


class MomentSlot(Slot):
    """Room on the GPU for PIECE elements: their gradients, the codes and scales of both moments."""

    def __init__(self, device: torch.device):
        self.gradient = torch.empty(PIECE, dtype=torch.bfloat16, device=device)
        self.values = [torch.empty(PIECE, dtype=torch.uint8, device=device) for _ in range(2)]
        self.scales = [torch.empty(PIECE // BLOCK, dtype=torch.float32, device=device) for _ in range(2)]

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """The place of a gradient of this shape."""
        return _shaped(self.gradient, gradient)

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
        self.ring = Ring(self.device, MomentSlot)
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
                slot.of(arriving).copy_(arriving, non_blocking=True)
            with self.ring.outwards():
                self.ring.wait(slot.full)
                there.add_(slot.of(arriving))
                slot.free = self.ring.event()

    def _keep_few(self) -> None:
        """Frees the oldest gradients beyond IN_FLIGHT_BYTES; what computes next waits until they are copied."""
        while len(self._leaving) > 1 and sum(one.gradient.nbytes for one in self._leaving) > IN_FLIGHT_BYTES:
            self.ring.wait(self._leaving.popleft().copied)

    def release(self) -> None:
        """Frees all gradients on the GPU; what computes next waits until they are copied."""
        while self._leaving:
            self.ring.wait(self._leaving.popleft().copied)

    def arrive(self) -> None:
        """What is queued from now on, on any stream, finds all gradients in host RAM."""
        self.release()
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


def stream_rows(
    ring: Ring, weight: torch.Tensor, gradient: torch.Tensor, moments: list[Moment], update: Callable
) -> None:
    """`update(weight, gradient, mean, root, first element)` on rows at a time: all but the weight lie in host RAM."""
    columns = weight[:1].numel()
    at_once = max(1, PIECE // max(columns, 1))
    for start in range(0, len(weight), at_once):
        here = [moment.rows(start, start + at_once) for moment in moments]
        rows = slice(start, start + at_once)
        _stream_piece(ring, gradient[rows], here, partial(update, weight[rows]), start * columns)


def _stream_piece(ring: Ring, gradient: torch.Tensor, here: list[Moment], update: Callable, first: int) -> None:
    """`update(gradient, mean, root, first)` on what `gradient` and `here`, in host RAM, are on the GPU."""

    def fill(slot: MomentSlot) -> None:
        slot.of(gradient).copy_(gradient, non_blocking=True)
        for room, moment in zip(slot.moments(here), here, strict=True):
            room.copy_from(moment)

    def bring_back(slot: MomentSlot) -> None:
        for room, moment in zip(slot.moments(here), here, strict=True):
            moment.copy_from(room)

    ring.pass_through(fill, lambda slot: update(slot.of(gradient), *slot.moments(here), first), bring_back)
