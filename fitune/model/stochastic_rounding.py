"""Rounding to bf16 up or down by chance, right on average, as trained weights are kept and written."""

import torch

from fitune.model.elementwise import GOLDEN, WORD, mix


def rounded(exact: torch.Tensor, key: int, first_element: int) -> torch.Tensor:
    """bf16, up or down with probabilities whose mean is `exact` (float32, which is overwritten).

    What is drawn follows from `key`, of 32 bits, and each element's place: `first_element` is the first one's.

    bf16 is the upper half of a float32's bits. A random number of 16 bits, added to the lower half, carries over as
    often as the lower half is part of the distance to the next number.
    """
    places = torch.arange(exact.numel(), device=exact.device).view(exact.shape) + first_element
    drawn = mix((places * GOLDEN & WORD) ^ key) & 0xFFFF
    bits = exact.view(torch.int32)
    bits.add_(drawn.int()).bitwise_and_(-0x10000)
    return exact.bfloat16()
