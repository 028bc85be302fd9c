"""One step of AdamW on some rows of a bf16 weight, the moments unpacked from 8 bits and packed again.

On a GPU it is one Triton kernel (`fitune.optimizers.adamw_triton`); elsewhere the formulas below, which the kernel is
tested against. r rows, c columns.
"""

from dataclasses import replace
from functools import cache

import torch
from bitsandbytes import functional as bnb

from fitune.model.stochastic_rounding import rounded
from fitune.optimizers.moment import Code, Moment, Step

PIECE = 2**22
"Elements worked on at once where there is no kernel: their float32 copies take 16 MiB each."


@cache
def codes(device: torch.device) -> tuple[Code, Code]:
    """Of both moments: from -1 to 1, and from 0 to 1."""
    return tuple(Code.of(bnb.create_dynamic_map(signed=signed).float().to(device)) for signed in (True, False))


SMALLEST_ROOT = 1
"""The code that the root of a mean square has at least. Code 0 stands for zero: an element whose gradients are small
beside its block's would be divided by eps, and jump."""


def update_rows(weight: torch.Tensor, gradient: torch.Tensor, mean: Moment, root: Moment, step: Step) -> None:
    """One step on `weight` and `gradient`, bf16 [r, ...], in place."""
    if not len(weight):
        return
    if weight.is_cuda and mean.scales is not None:
        from fitune.optimizers import adamw_triton

        adamw_triton.update_rows(weight, gradient, mean, root, step, codes(weight.device), SMALLEST_ROOT)
        return
    columns = weight[0].numel()
    at_once = max(1, PIECE // columns)
    for start in range(0, len(weight), at_once):
        rows = slice(start, start + at_once)
        there = replace(step, first_element=step.first_element + start * columns)
        moments = (moment.rows(rows.start, rows.stop) for moment in (mean, root))
        _update(weight[rows], gradient[rows], *moments, there)


def _update(weight: torch.Tensor, gradient: torch.Tensor, mean: Moment, root: Moment, step: Step) -> None:
    signed, unsigned = codes(weight.device)
    g = gradient.float() * step.gradient_scale
    m = mean.read(signed).lerp_(g, 1 - step.beta1)
    v = root.read(unsigned).square_().mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2).sqrt_()
    mean.write(m, signed, smallest=0)
    root.write(v, unsigned, smallest=SMALLEST_ROOT)
    divisor = v.div_((1 - step.beta2**step.number) ** 0.5).add_(step.eps)
    exact = weight.float().mul_(1 - step.rate * step.decay)
    exact.addcdiv_(m, divisor, value=-step.rate / (1 - step.beta1**step.number))
    weight.copy_(rounded(exact, step.key, step.first_element) if step.stochastic else exact)
