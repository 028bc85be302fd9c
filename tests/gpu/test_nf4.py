"""The kernels that dequantise NF4 against bitsandbytes' own."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from fitune.model.nf4 import STORAGE, NF4Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (576, 1536), (1024, 4096), (4096, 14336), (28672, 8192)], ids=str)
def test_weights_are_those_of_bitsandbytes(shape, dtype):
    """To the last bit: the same roundings in the same order."""
    from fitune.model.nf4_triton import dequantise

    base, expected = packed(*shape, dtype)
    assert torch.equal(dequantise(base, dtype), expected)


@pytest.mark.parametrize("shapes", [(4096, 1024, 1024, 4096), (8192, 1024, 1024, 8192), (3, 1, 2, 64)], ids=str)
def test_three_weights_are_written_by_one_kernel(shapes):
    from fitune.model.nf4_triton import dequantise_three

    *outputs, inputs = shapes
    pairs = [packed(rows, inputs, torch.bfloat16) for rows in outputs]
    out = torch.empty(sum(outputs), inputs, dtype=torch.bfloat16, device="cuda")
    dequantise_three([base for base, _ in pairs], out)
    assert torch.equal(out, torch.cat([expected for _, expected in pairs]))


def packed(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[NF4Linear, torch.Tensor]:
    """A linear, and its weight as bitsandbytes reads it."""
    weight = (torch.randn(outputs, inputs, device="cuda") * 0.02).to(dtype)
    numbers, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    base = NF4Linear(inputs, outputs)
    base.weight = torch.nn.Parameter(numbers.view(-1).view(STORAGE).view(-1, 1), requires_grad=False)
    base.quant_state = state
    return base, dequantize_4bit(numbers, state)
