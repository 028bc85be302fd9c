"""Products with frozen weights, in place where they can be: y = x W^T and dx = dy W.

The linears that read one input are given together. Weights packed in NF4 are dequantised just before, one at a time:
the allocator gives each the memory of the last one.
"""

import copy

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from fitune.model.nf4 import BLOCK, NF4Linear


def weight(base: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]."""
    if not isinstance(base, NF4Linear):
        return base.weight
    packed, state = base.weight.view(torch.uint8).view(-1, 1), base.quant_state
    if state.dtype != dtype:  # that of the weight before it was packed: rounding to it first would lose digits
        state = copy.copy(state)
        state.dtype = dtype
    if packed.is_cuda and state.nested and state.blocksize == BLOCK:
        from fitune.model.nf4_triton import dequantise

        return dequantise(packed, state)
    return dequantize_4bit(packed, state)


def multiply(
    x: torch.Tensor, bases: list[nn.Linear], out: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """out = x W^T (+ residual), the weights of `bases` stacked; x [T, in], out and residual [T, all their outputs].

    Returns out.
    """
    widths = [base.out_features for base in bases]
    residuals = residual.split(widths, dim=1) if residual is not None else [None] * len(bases)
    for base, part, addend in zip(bases, out.split(widths, dim=1), residuals, strict=True):
        matrix = weight(base, x.dtype).t()
        if addend is None:
            torch.mm(x, matrix, out=part)
        else:
            torch.addmm(addend, x, matrix, out=part)
    return out


def multiply_backward(dys: list[torch.Tensor], bases: list[nn.Linear]) -> torch.Tensor:
    """The sum of dys[n] W_n, [T, in]; dys[n] [T, outputs of bases[n]]."""
    total = dys[0] @ weight(bases[0], dys[0].dtype)
    for dy, base in zip(dys[1:], bases[1:], strict=True):
        total.addmm_(dy, weight(base, dy.dtype))
    return total
