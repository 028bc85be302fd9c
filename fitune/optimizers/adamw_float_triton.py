"""The Triton kernel of `fitune.optimizers.adamw_rows`: one step of AdamW on a float32 tensor. Imported on GPUs alone.

It reads gradient, weight and moments once and writes weight and moments once: 28 bytes an element, 26 where gradients
are bf16. torch's fused step writes the gradient, too, where it is to be scaled. The moments' corrections are float64,
of logarithms in float32.
"""

import math

import torch
import triton
import triton.language as tl

from fitune.model.grid import blocks_of
from fitune.model.launched import Launched

BLOCK = 1024  # elements of one program


@Launched
@triton.jit(do_not_specialize=["count"])
def _adamw_kernel(weight, gradient, mean, square, steps, scale, count, rate, decay, new1, new2, log1, log2, eps,
                  BLOCK: tl.constexpr):  # fmt: skip
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < count
    number = tl.load(steps).to(tl.float64)
    correction1 = (1.0 - tl.exp(number * log1)).to(tl.float32)
    correction2 = tl.sqrt((1.0 - tl.exp(number * log2)).to(tl.float32))
    g = tl.load(gradient + elements, mask=inside).to(tl.float32) * tl.load(scale)
    m = tl.load(mean + elements, mask=inside)
    m += (g - m) * new1
    v = tl.load(square + elements, mask=inside)
    v += (g * g - v) * new2
    w = tl.load(weight + elements, mask=inside)
    w -= decay * w
    w -= rate / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(mean + elements, m, mask=inside)
    tl.store(square + elements, v, mask=inside)
    tl.store(weight + elements, w, mask=inside)


def update(
    weight: torch.Tensor, gradient: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, steps: torch.Tensor,
    group: dict, scale: torch.Tensor,
) -> None:  # fmt: skip
    """Changes weight and moments in place: contiguous, float32, of the gradient's shape, which may be bf16.

    `steps` and `scale` are scalars on the same GPU, float32: this step's number, counted from 1, and what the gradient
    is multiplied by.
    """
    rate, (beta1, beta2) = float(group["lr"]), group["betas"]
    log1, log2 = (math.log(max(beta, 1e-30)) for beta in (beta1, beta2))
    count = weight.numel()
    with torch.cuda.device(weight.device):
        _adamw_kernel[(blocks_of(count, BLOCK),)](
            weight, gradient, mean, square, steps, scale, count, rate, rate * group["weight_decay"], 1.0 - beta1,
            1.0 - beta2, log1, log2, float(group["eps"]), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
