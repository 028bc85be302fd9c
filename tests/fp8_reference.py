"""Rounding to fp8 without fitune's code and without the dtype, and what models that round have to have in common."""

import torch
from rounding import distance


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


def assert_equal_bits(models: list[dict[str, torch.Tensor]], unrounded: dict[str, torch.Tensor]) -> None:
    """Of all tensors, by name, in each of the models, whose logits rounding has moved away from `unrounded`'s."""
    expected, *others = models
    assert 0.001 < distance(expected["logits"], unrounded["logits"]) < 0.2
    for found in others:
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
