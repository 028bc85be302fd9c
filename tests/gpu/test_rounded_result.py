"""What full fine-tuning writes, rounded by a GPU: to the bit what the CPU rounds, wherever the weights lie."""

import pytest
import torch

from fitune.training.result import ROUNDED_AT_ONCE, as_on_disk
from fitune.weights.safetensors_files import TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.parametrize("weights_on", ["cpu", "cuda"])
def test_a_result_is_rounded_as_the_cpu_does(weights_on, monkeypatch):
    """In pieces, the last one shorter."""
    weight = torch.randn(5, ROUNDED_AT_ONCE // 2 + 3, generator=torch.Generator().manual_seed(0))
    spec, trained = TensorSpec("weight", torch.bfloat16, tuple(weight.shape)), weight.clone()
    with monkeypatch.context() as without_gpu:
        without_gpu.setattr(torch.cuda, "is_initialized", lambda: False)
        expected = as_on_disk(weight, spec)
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    assert torch.equal(as_on_disk(weight.to(weights_on), spec), expected)
    assert torch.cuda.max_memory_allocated() > 0
    assert torch.equal(weight, trained)
