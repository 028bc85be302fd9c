"""Float32 weights of full fine-tuning as a bf16 file: what training changed is still there, on average."""

import math

import torch

from fitune.training.result import as_on_disk
from fitune.weights.safetensors_files import TensorSpec

ROWS, COLUMNS = 64, 4096


def test_changes_below_half_of_bf16s_last_digit_survive_on_average():
    """To the nearest, every one of them would be lost."""
    change, digit = 2**-11, 2**-7  # of numbers from 1 on
    weight = torch.full((ROWS, COLUMNS), 1 + change)
    assert (weight.bfloat16() == 1).all()
    saved = as_on_disk(weight, TensorSpec("weight", torch.bfloat16, (ROWS, COLUMNS)))
    assert saved.dtype == torch.bfloat16 and set(saved.unique().tolist()) == {1.0, 1 + digit}
    deviation = math.sqrt(change * digit / saved.numel())
    assert abs(saved.double().mean() - 1 - change) <= 5 * deviation


def test_what_bf16_holds_stays_and_other_dtypes_are_as_ever():
    weight = torch.randn(ROWS, COLUMNS).bfloat16().float()
    shape = tuple(weight.shape)
    assert torch.equal(as_on_disk(weight, TensorSpec("weight", torch.bfloat16, shape)).float(), weight)
    assert torch.equal(as_on_disk(weight, TensorSpec("weight", torch.float32, shape)), weight)
    other = torch.randn(ROWS, COLUMNS)
    assert torch.equal(as_on_disk(other, TensorSpec("weight", torch.float16, shape)), other.half())


def test_another_tensor_draws_other_numbers():
    weight = torch.full((ROWS, COLUMNS), 1 + 2**-8)
    one, other = (as_on_disk(weight, TensorSpec(name, torch.bfloat16, (ROWS, COLUMNS))) for name in "ab")
    assert 0.4 < (one != other).float().mean() < 0.6
