"""The kernel that dequantises NF4 against bitsandbytes' own."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (576, 1536), (1024, 4096), (4096, 14336), (28672, 8192)], ids=str)
def test_weights_are_those_of_bitsandbytes(shape, dtype):
    """To the last bit: the same roundings in the same order."""
    from fitune.model.nf4_triton import dequantise

    weight = (torch.randn(*shape, device="cuda") * 0.02).to(dtype)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    found, expected = dequantise(packed.view(-1), state, dtype), dequantize_4bit(packed, state)
    assert torch.equal(found, expected)
