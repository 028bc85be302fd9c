"""The numbers of fp8 products: what formulas and kernels are told about them.

e4m3 has 3 bits after the point: rounding to it takes or adds 1/16 of a number at most, or, below 1/28672 of its row's
largest, 1/458752 of that.
"""

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-30
"A row's largest value counts as at least this, so that a row of zeros has a scale, and 1 / scale is finite."


def scales_for(largest: torch.Tensor) -> torch.Tensor:
    """The scales of rows with these largest values: they become 448."""
    return largest.float().clamp(min=SMALLEST) / LARGEST
