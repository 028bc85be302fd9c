"""Layers' inputs that wait in host RAM for the backward pass: they travel while layers compute.

Forward: a layer's input leaves beside the layer's own computing. Backward: while a layer computes, the input of the one
before it comes back, unless it is so large that its travel is nothing beside what is computed from it. The RAM is
page-locked and used again in the next pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch.autograd.graph import saved_tensors_hooks

from fitune.config.tiles import INPUT_AHEAD_BYTES
from fitune.weights.host_ram import HostLink, host_zeros


@dataclass
class _Waiting:
    """An input in host RAM."""

    host: torch.Tensor
    room: torch.Tensor
    "What `host` is the beginning of, bytes."
    before: "_Waiting | None"
    "That of the layer before, in the same pass."
    device: torch.device
    arriving: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None


class HostInputs:
    """Of all layers of a model that compute again what their backward pass needs."""

    def __init__(self):
        self._link: HostLink | None = None
        self._rooms: list[torch.Tensor] = []
        "Page-locked bytes that nothing waits in."
        self._last: _Waiting | None = None
        "Of those that wait, the one that left last."
        self._leaving: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def leave(self, x: torch.Tensor) -> _Waiting | torch.Tensor:
        """What `bring` takes to return an equal tensor. `x` must not change before `let_go`."""
        x = x.detach()
        if not x.numel():
            return x
        self._link = link = self._link or HostLink(x.device)
        room = self._room(x.nbytes, x.device)
        self._last = waiting = _Waiting(room[: x.nbytes].view(x.dtype).view(x.shape), room, self._last, x.device)
        ready = link.event()
        with link.outwards():
            link.wait(ready)
            waiting.host.copy_(x, non_blocking=True)
            self._leaving.append((x, link.event()))
        return waiting

    def let_go(self) -> None:
        """Frees on the GPU what has left; what computes next waits until it has."""
        while self._leaving:
            _, left = self._leaving.pop()
            self._link.wait(left)

    def bring(self, waiting: _Waiting | torch.Tensor) -> torch.Tensor:
        """The input where it was before, once. The layers' backward passes must ask in their order."""
        if isinstance(waiting, torch.Tensor):
            return waiting
        self._start(waiting)
        self._link.wait(waiting.arrived)
        x, waiting.arriving, self._last = waiting.arriving, None, waiting.before
        self._rooms.append(waiting.room)
        if waiting.before and waiting.before.host.nbytes <= INPUT_AHEAD_BYTES:
            self._start(waiting.before)
        waiting.before = None
        return x

    def around(self, checkpoint: Callable) -> Callable:
        """torch's `checkpoint`, whose inputs wait here."""

        @wraps(checkpoint)
        def checkpoint_in_host_ram(*args, **kwargs):
            with saved_tensors_hooks(self.leave, self.bring):
                result = checkpoint(*args, **kwargs)
            self.let_go()
            return result

        return checkpoint_in_host_ram

    def _start(self, waiting: _Waiting) -> None:
        """Starts its way back, if that is not done."""
        if waiting.arriving is not None:
            return
        link = self._link
        waiting.arriving = torch.empty_like(waiting.host, device=waiting.device, pin_memory=False)
        ready = link.event()  # the memory just taken may still be read by kernels that were queued before
        with link.inwards():
            link.wait(ready)
            waiting.arriving.copy_(waiting.host, non_blocking=True)
            waiting.arrived = link.event()

    def _room(self, size: int, beside: torch.device) -> torch.Tensor:
        """Page-locked RAM of at least `size` bytes; what is too small for this pass goes."""
        while self._rooms:
            room = self._rooms.pop()
            if len(room) >= size:
                return room
        return host_zeros((size,), torch.uint8, beside)
