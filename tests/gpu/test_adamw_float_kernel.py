"""AdamW's step on large float32 tensors of a GPU, by a kernel of fitune's: that of torch's AdamW on the CPU."""

import copy
import math

import pytest
import torch

from fitune.optimizers import adamw_rows
from fitune.optimizers.adamw_rows import LARGE, AdamWOnRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
SIZES = [(7,), (1024, 1024), (1025, 1023), (3, 21), (LARGE + 1,)]
ROUNDINGS = 8 * torch.finfo(torch.float32).eps


def _weights(device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(device)) for size in SIZES]


def _optimizer(kind, weights, betas) -> torch.optim.Optimizer:
    groups = [{"params": weights[:2], "weight_decay": 0.0}, {"params": weights[2:], "weight_decay": 0.3}]
    return kind(groups, lr=0.01, betas=betas, fused=True)


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
def test_the_step_is_that_of_torchs_adamw(betas, gradients):
    """The third step is not clipped; before it the state goes through a checkpoint."""
    mine, theirs = _weights("cuda"), _weights("cpu")
    found, expected = _optimizer(AdamWOnRows, mine, betas), _optimizer(torch.optim.AdamW, theirs, betas)
    for step, max_norm in enumerate((1.0, 1e6, math.inf, 1.0)):
        generator = torch.Generator().manual_seed(step)
        for on_gpu, on_cpu in zip(mine, theirs, strict=True):
            gradient = torch.randn(on_cpu.shape, generator=generator).to(gradients)
            on_gpu.grad_dtype = None
            on_cpu.grad, on_gpu.grad = gradient.float(), gradient.cuda()
        if step == 2:
            found.load_state_dict(copy.deepcopy(found.state_dict()))
        before = [weight.grad.clone() for weight in mine]
        norm = found.clip(max_norm)
        found.step()
        assert all(torch.equal(w.grad, was) for w, was in zip(mine, before, strict=True) if w.numel() >= LARGE)
        for weight in theirs:
            weight.grad *= min(1.0, max_norm / (float(norm) + 1e-6))
        expected.step()
        for on_gpu, on_cpu in zip(mine, theirs, strict=True):
            _assert_equal_but_for_rounding(on_gpu, on_cpu)
            states = found.state[on_gpu], expected.state[on_cpu]
            assert {float(state["step"]) for state in states} == {step + 1.0}
            for key in ("exp_avg", "exp_avg_sq"):
                _assert_equal_but_for_rounding(*(state[key] for state in states))


def _assert_equal_but_for_rounding(found, expected):
    """torch has 1 - beta from a beta rounded to float32: 0.001 is 1.3e-5 of it off."""
    scale = max(expected.detach().abs().max().item(), 1.0)
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=2e-5, atol=ROUNDINGS * scale)


def test_large_contiguous_float32_tensors_alone_have_the_kernel():
    one = torch.zeros(LARGE, device="cuda")
    steps = torch.zeros((), device="cuda")
    assert adamw_rows._has_the_kernel((one, one, one, one, steps))
    assert adamw_rows._has_the_kernel((one, one.bfloat16(), one, one, steps))
    for other in (one[1:], one.double(), one.cpu(), torch.zeros(LARGE, 2, device="cuda")[:, 0]):
        assert not adamw_rows._has_the_kernel((other, one, one, one, steps))
    assert not adamw_rows._has_the_kernel((one, one.half(), one, one, steps))


def test_what_lies_in_host_ram_is_clipped_as_well_while_the_gpu_is_busy():
    """By the number of this step: its copy waits behind all that the GPU has to do."""
    weights = [torch.nn.Parameter(torch.zeros(4, device=device)) for device in ("cuda", "cpu")]
    optimizer = AdamWOnRows(weights, lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, fused=True)
    for largest in (8.0, 4.0):
        for weight in weights:
            weight.data.zero_()
            weight.grad = torch.full_like(weight, largest)
        torch.cuda._sleep(2 * 10**8)
        optimizer.clip(1.0)
        torch.cuda._sleep(2 * 10**9)
        optimizer.step()
        clipped = 1.0 / 8**0.5
        for weight in weights:
            torch.testing.assert_close(weight.detach().cpu(), torch.full((4,), -clipped / (clipped + 1)))
