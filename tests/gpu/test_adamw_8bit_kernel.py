"""8-bit AdamW's kernel on a GPU against the formulas on the CPU: the same draws, the same codes but for rounding."""

from dataclasses import replace

import pytest
import torch

from fitune.optimizers.adamw_step import codes, update_rows
from fitune.optimizers.moment import Moment, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


def _zeros(rows: int, columns: int, block: int, device: str) -> Moment:
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
    return Moment(codes, torch.zeros(rows, columns // block, device=device))


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(("rows", "columns", "block"), [(1000, 4096, 256), (3, 576, 64), (49, 384, 128)])
def test_the_kernel_does_what_the_formulas_do(rows, columns, block, stochastic):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, columns, generator=generator).bfloat16()
    weights = {device: start.to(device, copy=True) for device in ("cpu", "cuda")}
    moments = {device: [_zeros(rows, columns, block, device) for _ in range(2)] for device in weights}
    step = Step(rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.1, number=1, gradient_scale=0.5, key=3_000_000_000,
                first_element=2**31 + 5, stochastic=stochastic)  # fmt: skip
    for number in range(1, 4):
        gradient = torch.randn(rows, columns, generator=generator).bfloat16()
        gradient[0] = 0
        for device, weight in weights.items():
            update_rows(
                weight, gradient.to(device), *moments[device], replace(step, number=number, key=step.key + number)
            )
    found, wanted = weights["cuda"].cpu(), weights["cpu"]
    assert (found != wanted).float().mean() <= 0.005, "a rounding tips few draws"
    assert (found.float() - wanted.float()).norm() <= 1e-3 * wanted.float().norm()
    for of_gpu, of_cpu, code in zip(moments["cuda"], moments["cpu"], codes(torch.device("cpu")), strict=True):
        # a block's largest element may lie a code apart, if rounding tipped it: 1/64 of it where codes are far apart
        assert torch.allclose(of_gpu.scales.cpu(), of_cpu.scales, rtol=2 / 64)
        assert (of_gpu.values.cpu() != of_cpu.values).float().mean() <= 0.01
        # near zero neighbouring codes are many, so it is what they stand for that must be near
        of_gpu = Moment(of_gpu.values.cpu(), of_gpu.scales.cpu())
        scales = of_cpu.scales.repeat_interleave(block, dim=1)
        assert ((of_gpu.read(code) - of_cpu.read(code)).abs() <= 2 / 64 * scales).all()
