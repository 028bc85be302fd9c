"""Merged weights are rounded at random: small updates survive on average, the same merge writes the same bytes."""

import math

import pytest
import torch
from bases import make_adapter
from safetensors.torch import load_file, save_file

from fitune.export.merge import merge_adapter
from fitune.export.rounding import StochasticRounding
from fitune.weights.safetensors_files import Checkpoint


def rounded(values: torch.Tensor, dtype=torch.bfloat16, seed="a tensor") -> torch.Tensor:
    return StochasticRounding(seed, dtype)(values.clone())


@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.bfloat16, 7), (torch.float16, 10), (torch.float32, 23)], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_between_two_go_up_as_often_as_they_are_near(dtype, digits, sign):
    """A quarter of the way from 1 to the next value: a quarter of 40,000, within 6 standard deviations."""
    values = torch.full((1000, 40), sign * (1 + 2.0 ** -(digits + 2)))
    found = rounded(values, dtype)
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(found, values)
        return
    assert set(found.abs().unique().tolist()) == {1.0, 1 + 2.0**-digits}
    share = (found.abs() > 1).float().mean().item()
    assert abs(share - 0.25) < 6 * math.sqrt(0.25 * 0.75 / found.numel())


def test_what_the_dtype_holds_stays_and_what_is_too_large_shows():
    held = torch.tensor([0.0, -0.0, 1.0, -3.140625, 1e-30, 2.0**100, -(2.0**-130)]).bfloat16().float()
    assert torch.equal(rounded(held), held.bfloat16())
    assert rounded(torch.full((1000,), torch.finfo(torch.float32).max)).isinf().any()


@pytest.mark.parametrize("shape", [(60, 41), (60,), (7, 64)], ids=str)
def test_the_same_bytes_however_many_rows_at_a_time(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = rounded(values)
    rounding = StochasticRounding("a tensor", torch.bfloat16)
    pieces = torch.cat([rounding(rows.clone()) for rows in values.split([1, 2, shape[0] - 3])])
    assert torch.equal(pieces, whole)
    assert not torch.equal(rounded(values, seed="another"), whole)


def test_an_update_below_half_a_digit_survives_a_merge_on_average(base, tmp_path):
    """Each weight gets an eighth of its last bf16 digit, which rounding to the nearest drops from all of them."""
    name, adapter = "model.layers.0.mlp.up_proj.weight", tmp_path / "adapter"
    make_adapter(base, adapter, target_modules=["up_proj"], r=1, lora_alpha=1)
    with Checkpoint(base) as checkpoint:
        before = checkpoint.read(name).double()
    digit = 2.0 ** (before.abs().median().log2().floor().item() - 7)
    file = adapter / "adapter_model.safetensors"
    tensors = {n: torch.zeros_like(t) for n, t in load_file(file).items()}
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    tensors[f"{prefix}.lora_A.weight"] += digit / 8
    tensors[f"{prefix}.lora_B.weight"] += 1
    save_file(tensors, file)
    out = merge_adapter(base, adapter, tmp_path / "out", progress=False)
    with Checkpoint(out) as checkpoint:
        change = checkpoint.read(name).double() - before
    rows = before.abs() >= digit * 2**7  # of the update, smaller weights keep more
    assert torch.equal((before.float() + digit / 8).bfloat16()[rows].double(), before[rows])
    expected, spread = digit / 8, change[rows].std().item() / math.sqrt(rows.sum().item())
    assert abs(change[rows].mean().item() - expected) < 6 * spread < expected / 2


def test_a_merge_writes_the_same_bytes_again(base, adapter, tmp_path):
    files = [
        merge_adapter(base, adapter, tmp_path / name, progress=False, check=False) / "model.safetensors"
        for name in ("once", "again")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
