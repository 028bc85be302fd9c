"""Rounding to fp8 without fitune's code and without the dtype, for tests to compare with."""

import torch


def rounded_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Without the dtype: to the nearest multiple of an eighth of the power of two below, but of 2**-9 at least."""
    exponent = torch.frexp(x.double()).exponent - 1
    step = torch.exp2(exponent.double().clamp(min=-6) - 3)
    return torch.round(x.double() / step) * step


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of x rounded so that the largest is 448, their scales) in float64."""
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    return rounded_to_e4m3(x * (1 / scales)), scales.double()
