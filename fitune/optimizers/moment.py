"""What a step of 8-bit AdamW works on (`fitune.optimizers.adamw_step`): a moment in blocks, and the step's numbers.

r rows, c columns.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Code(NamedTuple):
    """What the 256 codes of a moment stand for, ascending, and how to find the one nearest to a number."""

    values: torch.Tensor
    "float32 [256]."
    middles: torch.Tensor
    "Between neighbours, float32 [256], the last infinite: a number above n of them has code n."
    starts: torch.Tensor
    """By the upper 16 bits of a float32, uint8 [65536]: how many middles lie below every number with these bits. At
    most one more middle has the same upper bits, so one comparison finds the code."""

    @classmethod
    def of(cls, values: torch.Tensor) -> "Code":
        infinite = torch.full_like(values[:1], torch.inf)
        middles = torch.cat([(values[1:] + values[:-1]) / 2, infinite])
        halves = torch.arange(2**16, dtype=torch.int32, device=values.device)
        lower = (halves >= 2**15).int() * 0xFFFF  # of the least number: all set where it is negative
        least = (halves << 16 | lower).view(torch.float32).nan_to_num()
        return cls(values, middles, torch.bucketize(least, middles).to(torch.uint8))


@dataclass(frozen=True)
class Moment:
    """The running mean of gradients, or the root of the running mean of their squares."""

    values: torch.Tensor
    "uint8 codes [r, c], or float32 of the weight's shape where there are no scales."
    scales: torch.Tensor | None
    "float32 [r, blocks of a row]."

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return self.values.numel() // self.scales.numel()

    def rows(self, start: int, stop: int) -> "Moment":
        return Moment(self.values[start:stop], None if self.scales is None else self.scales[start:stop])

    def copy_from(self, other: "Moment") -> None:
        """Of one whose values have scales, between host RAM and GPU; returns before it is done."""
        self.values.copy_(other.values, non_blocking=True)
        self.scales.copy_(other.scales, non_blocking=True)

    def read(self, code: Code) -> torch.Tensor:
        """float32; a copy."""
        if self.scales is None:
            return self.values.clone()
        values = code.values[self.values.view(-1, self.block).int()]
        return values.mul_(self.scales.view(-1, 1)).view(self.values.shape)

    def write(self, exact: torch.Tensor, code: Code, *, smallest: int) -> None:
        """Rounds to the nearest code of each block, `smallest` at least.

        bitsandbytes' own quantiser for CPUs (0.50.2) takes shares below 1e-5 for larger ones, as its tables are coarse.
        """
        if self.scales is None:
            self.values.copy_(exact)
            return
        blocks = exact.view(-1, self.block)
        scales = blocks.abs().amax(1, keepdim=True)
        shares = blocks / torch.where(scales > 0, scales, 1)
        codes = torch.bucketize(shares, code.middles)
        self.values.copy_(codes.clamp_(min=smallest).view(self.values.shape))
        self.scales.copy_(scales.view(self.scales.shape))


@dataclass(frozen=True)
class Step:
    """The numbers of one step for one weight."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    number: int
    "Counted from 1."
    gradient_scale: float
    "What gradients are multiplied by: below 1 where they are clipped."
    key: int
    "Of 32 bits. With the element's place it decides what is drawn for each element."
    first_element: int
    "The place in the whole weight of the first element given."
    stochastic: bool = True
    "False rounds to the nearest; only to compare with."
