"""AdamW on the GPU for weights, gradients and moments that lie in host RAM: piece by piece through a ring of slots.

A piece is flat, FLOAT_PIECE elements of one large tensor or of many small ones side by side: AdamW works on each
element by itself. All four numbers of an element travel in; weight and moments travel out, while the next piece comes
in (`fitune.optimizers.ring`).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter

import torch

from fitune.config.optimizer_pieces import FLOAT_PIECE
from fitune.model.host_ram import pin_in_place
from fitune.model.sharding import local_part, split_as
from fitune.optimizers.adamw_rows import AdamWOnRows, step_together
from fitune.optimizers.gradient_norm import norm_of_gradients, scale_to
from fitune.optimizers.ring import Ring, Slot

MOMENTS = ("exp_avg", "exp_avg_sq")
Part = Sequence[torch.Tensor]
"Gradient, weight and both moments of some elements: flat, of one length."


class AdamWStreamed(AdamWOnRows):
    """torch's fused AdamW, computed on `device`; weights and states stay in host RAM, DTensors where they are some.

    What does not lie in host RAM as float32 is changed where it lies. Of AdamW's variants (amsgrad, maximize) it has
    none. When `step` returns, everything has arrived, and the slots' memory is free.
    """

    def __init__(
        self, params, device: torch.device, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=None
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self._ring = Ring(device, FloatSlot)
        self._gradient_scale = 1.0
        self._page_locked: set[torch.nn.Parameter] = set()
        "The parameters whose moments are."

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """The gradients' norm over all ranks, float32; the next step scales them down to `max_norm` if it is larger.

        No gradient is written in host RAM. Call on all ranks.
        """
        norm = norm_of_gradients([parameter for group in self.param_groups for parameter in group["params"]])
        self._gradient_scale = float(scale_to(max_norm, norm))
        return norm

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Changes weights and moments in place."""
        for group in self.param_groups:
            for number, parts in groupby(self._of_group(group), key=itemgetter(0)):
                self._step_all(group, number, [part for _, part in parts])
        self._ring.finish()  # the next pass reads weights, a checkpoint the states
        self._ring.clear()
        self._gradient_scale = 1.0

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._page_locked.clear()

    def _init_group(self, group: dict, *lists: list[torch.Tensor]) -> bool:
        """Also page-locks moments, those just made and those of a checkpoint: a copy would else have Python wait."""
        new = {p for p in group["params"] if p.grad is not None} - self._page_locked
        if new:
            super()._init_group(group, *([] for _ in lists))  # makes those that are missing
            for parameter in new:
                state = self.state[parameter]
                state.update({key: page_locked(state[key], self._ring.device) for key in MOMENTS})
            self._page_locked |= new
        return super()._init_group(group, *lists)

    def _of_group(self, group: dict) -> Iterator[tuple[int, Part]]:
        """The number of this step, counted from 1, and the tensors of each parameter that has a gradient."""
        for weight, gradient, mean, square, step in self._parts(group):
            step += 1
            yield int(step), [gradient.reshape(-1), weight.view(-1), mean.view(-1), square.view(-1)]

    def _step_all(self, group: dict, number: int, tensors: list[Part]) -> None:
        in_host_ram, elsewhere = [], []
        for part in tensors:
            (in_host_ram if _travels(part[1]) else elsewhere).append(part)
        for parts in pieces(in_host_ram):
            self._step_piece(group, number, parts)
        for part in elsewhere:
            self._update(group, number, part)

    def _step_piece(self, group: dict, number: int, parts: list[Part]) -> None:
        sizes = [part[0].numel() for part in parts]

        def fill(slot: FloatSlot) -> None:
            _copy(slot.parts(sizes), parts)

        def bring_back(slot: FloatSlot) -> None:
            _copy([part[1:] for part in parts], [room[1:] for room in slot.parts(sizes)])

        self._ring.pass_through(fill, lambda slot: self._update(group, number, slot.flat(sum(sizes))), bring_back)

    def _update(self, group: dict, number: int, part: Part) -> None:
        """Where the part lies."""
        gradient, weight, mean, square = part
        if self._gradient_scale < 1:
            gradient.mul_(self._gradient_scale)
        steps_before = torch.full((), number - 1.0, dtype=torch.float32, device=weight.device)
        step_together(group, [(weight, gradient, mean, square, steps_before)])


class FloatSlot(Slot):
    """Room on the GPU for a piece: gradients, weights and both moments, float32."""

    def __init__(self, device: torch.device):
        self.values = torch.empty(4, FLOAT_PIECE, dtype=torch.float32, device=device)

    def flat(self, size: int) -> Part:
        return self.values[:, :size].unbind()

    def parts(self, sizes: list[int]) -> list[Part]:
        """Their places, side by side."""
        return list(zip(*(row.split(sizes) for row in self.flat(sum(sizes))), strict=True))


def _copy(targets: list[Part], sources: list[Part]) -> None:
    """Returns before it is done."""
    torch._foreach_copy_(list(chain(*targets)), list(chain(*sources)), non_blocking=True)


def _travels(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def pieces(tensors: Iterable[Part]) -> Iterator[list[Part]]:
    """Cuts and collects: each piece but the last has FLOAT_PIECE elements."""
    piece, room = [], FLOAT_PIECE
    for whole in tensors:
        size, start = whole[0].numel(), 0
        while start < size:
            stop = min(size, start + room)
            piece.append(whole if stop - start == size else [tensor[start:stop] for tensor in whole])
            start, room = stop, room - (stop - start)
            if not room:
                yield piece
                piece, room = [], FLOAT_PIECE
    if piece:
        yield piece


def page_locked(moment: torch.Tensor, beside: torch.device) -> torch.Tensor:
    """The same moment where the GPU reads it without Python's help: a large one in place, a small one as a copy.

    As it is where `beside`, the device it is for, is no GPU.
    """
    rows = local_part(moment)
    if beside.type != "cuda" or rows.device.type != "cpu" or not rows.numel():
        return moment
    pin_in_place(rows)
    if rows.is_pinned():
        return moment
    return split_as(moment, rows.pin_memory())
