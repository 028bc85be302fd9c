"""Numbers rounded to e4m3, by rows or by columns, and their product: what `fitune.model.fp8` is made of.

On a GPU Triton kernels round (`fitune.model.fp8_triton`) and `torch._scaled_mm` multiplies, which wants what it sums
over side by side in memory, in multiples of 16. Elsewhere the same numbers are multiplied in float32.
"""

from collections.abc import Sequence
from functools import cache

import torch

from fitune.model.e4m3 import E4M3, scales_for

MULTIPLE = 16
"Of which all sizes of a product must be, but for the rows of its first matrix."


def kernels():
    """Those of a GPU, which nothing else imports."""
    from fitune.model import fp8_triton

    return fp8_triton


def quantise_rows(
    x: torch.Tensor, factors: torch.Tensor | None = None, *, out: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3, scale of each row, float32 [T]) of x [T, channels], whose channels `factors` (float32) multiply first.

    In `out` if it is given, contiguous.
    """
    if out is None:
        out = torch.empty_like(x, dtype=E4M3), torch.empty(len(x), dtype=torch.float32, device=x.device)
    values, scales = out
    if x.is_cuda:
        kernels().quantise_rows(x, factors, values, scales)
        return values, scales
    x = x.float()
    if factors is not None:
        x = x * factors
    scales.copy_(scales_for(x.abs().amax(dim=1)))
    values.copy_(x * scales.reciprocal().unsqueeze(1))
    return values, scales


def quantise_columns(x: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [channels, T], scale of each channel, float32) of x [T, channels], whose tokens `factors` multiply first.

    Zeros fill up T to a multiple of 16.
    """
    columns = _columns_of(x)
    if x.is_cuda:
        return columns, kernels().quantise_columns(x, factors, columns)
    x = x.float() * factors.unsqueeze(1)
    scales = scales_for(x.abs().amax(dim=0))
    columns[:, : len(x)].copy_((x * scales.reciprocal()).t())
    return columns, scales


def round_columns(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """e4m3 [channels, T] of x [T, channels], whose tokens are divided by `scales`. Filled up as above."""
    columns = _columns_of(x)
    round_matrix(x, scales, columns.t()[: len(x)])
    return columns


def put(values: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (e4m3 [rows, columns], its rows or its columns side by side in memory) with values."""
    if out.is_cuda and not out.is_contiguous():
        kernels().transpose(values, out)
    else:
        out.copy_(values)


def _columns_of(x: torch.Tensor) -> torch.Tensor:
    """Room for x [T, channels] in e4m3, turned; what fills it up is there."""
    tokens = len(x)
    columns = torch.empty(x.shape[1], -(-tokens // MULTIPLE) * MULTIPLE, dtype=E4M3, device=x.device)
    if tokens % MULTIPLE:
        columns[:, tokens:].view(torch.uint8).zero_()
    return columns


def round_matrix(matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (e4m3 [rows, columns], any strides) with a matrix whose rows are divided by `scales`."""
    if out.is_cuda:
        kernels().round_matrix(matrix, scales, out)
    else:
        out.copy_(matrix.float() * scales.reciprocal().unsqueeze(1))


def product(
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    weight_scales: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """out = values weights^T times both scales (+ residual); values [T, k], weights [n, k], e4m3 and contiguous.

    `fast`: the GPU may add up in fewer bits than float32 has, which loses what is small beside a growing sum.
    """
    if values.is_cuda:
        scaled = {"scale_a": scales.unsqueeze(1), "scale_b": weight_scales.unsqueeze(0)}
        torch._scaled_mm(values, weights.t(), **scaled, out_dtype=out.dtype, use_fast_accum=fast, out=out)
    else:
        sums = torch.float64 if out.dtype == torch.float64 else torch.float32
        in_float = values.to(sums) @ weights.to(sums).t()
        out.copy_(in_float * scales.unsqueeze(1) * weight_scales)
    return out if residual is None else out.add_(residual)


@cache
def ones(size: int, device: torch.device) -> torch.Tensor:
    """Scales of a matrix whose own went into the other one before it was rounded."""
    return torch.ones(size, device=device)
