"""Room on the GPU through which pieces of what lies in host RAM travel: in, be worked on, and out again.

The streams of both directions share a ring of slots. A slot's events say when it is full and when it is free, so Python
never waits, and no memory is taken on the way.
"""

from collections import deque
from collections.abc import Callable

import torch

from fitune.config.optimizer_pieces import SLOTS
from fitune.model.host_ram import HostLink


class Slot:
    """One place of a ring. Its users add tensors on the GPU."""

    full = free = None
    "Events."


class Ring(HostLink):
    """The slots, and the link they travel by.

    `make_slot` allocates a slot's tensors on the device it is given.
    """

    def __init__(self, device: torch.device, make_slot: Callable[[torch.device], Slot]):
        super().__init__(device)
        self.make_slot = make_slot
        self._slots: deque[Slot] = deque()

    def filling(self) -> "_Filling":
        """A context on the stream inwards, whose value is the slot to fill, free by then."""
        if not self._slots:
            self._make_slots()
        self._slots.rotate(-1)
        return _Filling(self, self._slots[0])

    def pass_through(self, fill: Callable, work: Callable, empty: Callable) -> None:
        """Each is called with the slot: `fill` inwards, `work` on the stream in use, `empty` outwards."""
        with self.filling() as slot:
            fill(slot)
        self.wait(slot.full)
        work(slot)
        done = self.event()
        with self.outwards():
            self.wait(done)
            empty(slot)
            slot.free = self.event()

    def _make_slots(self) -> None:
        """Their memory may be what the stream in use has freed and, being behind, still works on: the others wait."""
        self._slots.extend(self.make_slot(self.device) for _ in range(SLOTS))
        ready = self.event()
        for stream in (self.inwards, self.outwards):
            with stream():
                self.wait(ready)

    def clear(self) -> None:
        """Gives the slots' memory back, after `finish`; the next piece makes new ones."""
        self._slots.clear()


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
