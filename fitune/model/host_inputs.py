"""What layers need to compute the rest again in the backward pass, in host RAM: it travels while layers compute.

Forward: a layer's input leaves beside the layer's own computing, and attention's result after it, where that is kept.
Backward: while a layer computes, what the one before it needs comes back, unless it is so large that its travel is
nothing beside what is computed from it. The RAM is page-locked and used again in the next pass.

What leaves in a forward pass must come back in a backward pass: else it stays in RAM as long as the model.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fitune.config.tiles import INPUT_AHEAD_BYTES
from fitune.model.host_ram import HostLink, host_zeros

FEW = 2
"Numbers of a tensor that stays where it is: the state of a random generator, which attention returns."


@dataclass
class _Waiting:
    """What one layer needs."""

    before: "_Waiting | None"
    "That of the layer before, in the same pass."
    parts: list[torch.Tensor] = field(default_factory=list)
    "In host RAM, but for what stays."
    rooms: dict[int, torch.Tensor] = field(default_factory=dict)
    "The bytes that they lie in, by their place among the parts."
    arriving: list[torch.Tensor] | None = None
    arrived: torch.cuda.Event | None = None


class HostInputs:
    """Of all layers of a model that compute again what their backward pass needs."""

    def __init__(self):
        self._link: HostLink | None = None
        self._rooms: dict[int, list[torch.Tensor]] = defaultdict(list)
        "Page-locked bytes that nothing waits in, by the place of what did: sizes of one kind."
        self._last: _Waiting | None = None
        "Of those that wait, the one that left last."
        self._leaving: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def offload(self, tensors: Sequence[torch.Tensor], waiting: _Waiting | None = None) -> _Waiting:
        """What `fetch` takes to return equal tensors. With `waiting` they join it. None may change before `release`."""
        if waiting is None:
            self._last = waiting = _Waiting(self._last)
        for tensor in tensors:
            waiting.parts.append(tensor if tensor.numel() <= FEW else self._to_host_ram(tensor.detach(), waiting))
        return waiting

    def release(self) -> None:
        """Frees on the GPU what has left; what computes next waits until it has."""
        while self._leaving:
            _, left = self._leaving.pop()
            self._link.wait(left)

    def fetch(self, waiting: _Waiting) -> list[torch.Tensor]:
        """The tensors where they were before, once. The layers' backward passes must ask in their order."""
        if not waiting.parts:
            raise RuntimeError("what a layer keeps in host RAM came back before: one backward pass a forward pass")
        self._start(waiting)
        self._link.wait(waiting.arrived)
        tensors, before, self._last = waiting.arriving, waiting.before, waiting.before
        for place, room in waiting.rooms.items():
            self._rooms[place].append(room)
        if before and sum(part.nbytes for part in before.parts) <= INPUT_AHEAD_BYTES:
            self._start(before)
        waiting.parts, waiting.rooms, waiting.arriving, waiting.before = [], {}, None, None
        return tensors

    def _to_host_ram(self, tensor: torch.Tensor, waiting: _Waiting) -> torch.Tensor:
        self._link = link = self._link or HostLink(tensor.device)
        place = len(waiting.parts)
        waiting.rooms[place] = room = self._room(place, tensor.nbytes, tensor.device)
        host = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        ready = link.event()
        with link.outwards():
            link.wait(ready)
            host.copy_(tensor, non_blocking=True)
            self._leaving.append((tensor, link.event()))
        return host

    def _start(self, waiting: _Waiting) -> None:
        """Starts the way back, if that is not done."""
        if waiting.arriving is not None:
            return
        link = self._link
        waiting.arriving = [
            part if part.numel() <= FEW else torch.empty_like(part, device=link.device, pin_memory=False)
            for part in waiting.parts
        ]
        ready = link.event()  # the memory just taken may still be read by kernels that were queued before
        with link.inwards():
            link.wait(ready)
            for part, place in zip(waiting.parts, waiting.arriving, strict=True):
                if place is not part:
                    place.copy_(part, non_blocking=True)
            waiting.arrived = link.event()

    def _room(self, place: int, size: int, beside: torch.device) -> torch.Tensor:
        """Page-locked RAM of at least `size` bytes. Where one is too small, all go: they are those of shorter rows."""
        rooms = self._rooms[place]
        if rooms and len(rooms[-1]) >= size:
            return rooms.pop()
        if rooms:
            self._link.finish()  # what was in them may still be on its way
            rooms.clear()
        return host_zeros((size,), torch.uint8, beside)
