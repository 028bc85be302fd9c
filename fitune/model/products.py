"""Products with frozen weights, in place where they can be: y = x W^T and dx = dy W.

The linears that read one input are given together. Weights packed in NF4 are dequantised just before: stacked where one
is larger than the others together, as that of q is, else one at a time. The allocator gives each the memory of the last
one. Weights kept in fp8 are dequantised one at a time, in evaluations while training; its steps multiply them as they
are (`fitune.model.fp8`).
"""

import copy
from collections.abc import Iterator

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from fitune.model.fp8_linear import FP8Linear
from fitune.model.linears import of_columns
from fitune.model.nf4 import NF4Linear

ADDS_IN_PLACE = True
"A product is added to what its output holds for the time it takes to compute it."


def _kernels():
    from fitune.model import nf4_triton

    return nf4_triton


def weight(base: nn.Linear, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """[out, in], of an NF4 weight in `out` if it is given."""
    if isinstance(base, FP8Linear):
        return base.dequantised(dtype)
    if not isinstance(base, NF4Linear):
        return base.weight
    if base.weight.is_cuda and base.is_as_kernels_read_it:
        return _kernels().dequantise(base, dtype, out)
    packed, state = base.weight.view(torch.uint8).view(-1, 1), base.quant_state
    if state.dtype != dtype:  # that of the weight before it was packed: rounding to it first would lose digits
        state = copy.copy(state)
        state.dtype = dtype
    if out is not None and not packed.is_cuda:  # bitsandbytes writes into a given tensor on GPUs alone
        return out.copy_(dequantize_4bit(packed, state))
    return dequantize_4bit(packed, state, out=out)


def multiply(
    x: torch.Tensor, bases: list[nn.Linear], out: torch.Tensor, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """out = x W^T (+ addend), the weights of `bases` stacked; x [T, in], out and addend [T, all their outputs].

    The addend may be `out`. Returns out.
    """
    for columns, matrix in _weights(bases, x.dtype):
        part = of_columns(out, columns)
        if addend is None:
            torch.mm(x, matrix.t(), out=part)
        elif addend is out:
            part.addmm_(x, matrix.t())
        else:
            torch.addmm(of_columns(addend, columns), x, matrix.t(), out=part)
        del matrix  # before the next one is there
    return out


def multiply_backward(dy: torch.Tensor, bases: list[nn.Linear], total: torch.Tensor | None = None) -> torch.Tensor:
    """dy W, [T, in], added to `total` if it is given; dy [T, all outputs of `bases`]."""
    for columns, matrix in _weights(bases, dy.dtype):
        part = of_columns(dy, columns)
        total = part @ matrix if total is None else total.addmm_(part, matrix)
        del matrix
    return total


def add(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`sums` += a b in float32, without rounding the product to the dtype of a and b before."""
    if sums.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))


def _weights(bases: list[nn.Linear], dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(columns of the output, [those, in]) of all weights, one after the other."""
    widths = [base.out_features for base in bases]
    if len(bases) > 1 and 2 * max(widths) > sum(widths) and all(isinstance(base, NF4Linear) for base in bases):
        yield slice(0, sum(widths)), _stacked(bases, widths, dtype)
        return
    start = 0
    for base, width in zip(bases, widths, strict=True):
        yield slice(start, start + width), weight(base, dtype)
        start += width


def _stacked(bases: list[nn.Linear], widths: list[int], dtype: torch.dtype) -> torch.Tensor:
    whole = torch.empty(sum(widths), bases[0].in_features, dtype=dtype, device=bases[0].weight.device)
    if whole.is_cuda and len(bases) == 3 and all(base.is_as_kernels_read_it for base in bases):
        return _kernels().dequantise_three(bases, whole)
    for base, part in zip(bases, whole.split(widths), strict=True):
        weight(base, dtype, part)
    return whole
