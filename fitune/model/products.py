"""Products with a frozen weight, in place where they can be: y = x W^T + b and dx = dy W.

Weights packed in NF4 are dequantised just before, one at a time: the allocator gives each the memory of the last one.
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


def multiply(x: torch.Tensor, base: nn.Linear, out: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    """out = x W^T (+ b) (+ residual); x [T, in], out and residual [T, out]."""
    matrix = weight(base, x.dtype).t()
    if residual is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(residual, x, matrix, out=out)
    if base.bias is not None:
        out += base.bias


def multiply_backward(dy: torch.Tensor, base: nn.Linear, total: torch.Tensor | None) -> torch.Tensor:
    """dy W, [T, in], added to `total` in place where there is one."""
    matrix = weight(base, dy.dtype)
    return dy @ matrix if total is None else total.addmm_(dy, matrix)
