"""Products with a weight in fp8: y = x W^T and dx = dy W of numbers rounded to e4m3, summed in float32.

    x  ~ a X     X [T, in] in e4m3, a [T]: a scale for each token, so that its largest value becomes 448
    W  ~ s V     V [out, in] in e4m3, s [out]: a scale for each row
    y_tn  = a_t s_n sum_i X_ti V_ni
    dx_ti = b_t sum_n Y_tn V_ni          Y ~ dy s / b, b [T]

A scale must stand outside the sum it belongs to. Forward sums over a row of W, so its scale can. Backward sums over the
rows: there their scales go into dy before it is rounded. So both use one V and one s, and dx is the gradient of what
forward computed.

The linears that read one input are one product: q, k and v, gate and up. On a GPU `torch._scaled_mm` multiplies and
Triton kernels round (`fitune.model.fp8_triton`); elsewhere the same numbers are multiplied in float32.

NF4 weights become V just before each product. Those of method lora are kept as V and s (`fitune.model.fp8_linear`).
Forward takes V as it lies where one linear reads the input. Of several the bytes are copied into one matrix, which
moves two thirds of what rounding bf16 does: products apart would be smaller, and their bits might be others than with
weights rounded on the way. Backward adds up over the rows of all linears, and `torch._scaled_mm` wants what it sums
over side by side in memory, so there V is transposed into one matrix.

Weights that are trained are rounded on the way, each linear by itself (`fitune.model.trained_fp8_linear`).

A NaN stays a NaN. An infinite value makes its token's results NaN. Finite values do not overflow.
"""

from functools import cache

import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import nn

from fitune.errors import UsageError
from fitune.model.e4m3 import E4M3, scales_for
from fitune.model.fp8_linear import FP8Linear
from fitune.model.nf4 import NF4Linear
from fitune.model.products import weight

MULTIPLE = 16
"Of which both sizes of a weight must be, for `torch._scaled_mm`."
ADDS_IN_PLACE = False
"See `fitune.model.products`."


def check_sizes(base: nn.Linear) -> None:
    """Raises UsageError for a linear that cannot be multiplied in fp8."""
    if base.in_features % MULTIPLE or base.out_features % MULTIPLE:
        raise UsageError(
            f"profile.compute fp8 needs linears whose sizes are multiples of {MULTIPLE}, here is one of "
            f"{base.out_features} x {base.in_features}; use --set profile.compute=bf16"
        )


def _kernels():
    from fitune.model import fp8_triton

    return fp8_triton


def multiply(
    x: torch.Tensor, bases: list[nn.Linear], out: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """out = x W^T (+ residual), the weights of `bases` stacked; x [T, in], out [T, all their outputs], contiguous."""
    values, scales = quantise_rows(x)
    return _product(values, scales, _stacked(bases), row_scales(bases), out, residual)


def multiply_backward(dy: torch.Tensor, bases: list[nn.Linear]) -> torch.Tensor:
    """dy W, [T, in]; dy [T, all outputs of `bases`]."""
    transposed = _stacked(bases, transposed=True)
    values, scales = quantise_rows(dy, row_scales(bases))
    out = dy.new_empty(dy.shape[0], bases[0].in_features)
    return _product(values, scales, transposed, _ones(bases[0].in_features, scales.device), out)


def multiply_rounded(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T (+ bias), [T, out]; x [T, in], and (V, s) of one weight, from `round_weight`."""
    return _product(*quantise_rows(x), values, scales, x.new_empty(len(x), len(values)), bias)


def multiply_rounded_backward(dy: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """dy W, [T, in]; dy [T, out], a weight [out, in] and its s."""
    inputs = matrix.shape[1]
    transposed = matrix.new_empty(inputs, len(matrix), dtype=E4M3)
    _round_matrix(matrix, scales, transposed.t())
    return _product(*quantise_rows(dy, scales), transposed, _ones(inputs, dy.device), dy.new_empty(len(dy), inputs))


@cache
def _ones(size: int, device: torch.device) -> torch.Tensor:
    return torch.ones(size, device=device)


def quantise_rows(x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3, scale of each row, float32 [T]) of x [T, channels], whose channels `factors` (float32) multiply first."""
    if x.is_cuda:
        return _kernels().quantise_rows(x, factors)
    x = x.float()
    if factors is not None:
        x = x * factors
    scales = scales_for(x.abs().amax(dim=1))
    return (x * scales.reciprocal().unsqueeze(1)).to(E4M3), scales


def row_scales(bases: list[nn.Linear]) -> torch.Tensor:
    """s of the stacked weights, float32 [all outputs]. Found at the first use and kept: they do not change."""
    if getattr(bases[0], "fp8_scales", None) is None:
        bases[0].fp8_scales = torch.cat([_scales(base) for base in bases])
        for base, part in zip(bases, bases[0].fp8_scales.split(_outputs(bases)), strict=True):
            if isinstance(base, FP8Linear):
                base.scales = part  # so that they are there once
    return bases[0].fp8_scales


def _outputs(bases: list[nn.Linear]) -> list[int]:
    return [base.out_features for base in bases]


def _scales(base: nn.Linear) -> torch.Tensor:
    """s of one weight. A row of NF4 has the largest of its blocks' scales: a code of each block stands for 1 or -1."""
    if isinstance(base, FP8Linear):
        return base.scales
    if isinstance(base, NF4Linear) and base.is_as_kernels_read_it:
        state = base.quant_state
        blocks = dequantize_blockwise(state.absmax, state.state2) + state.offset
        return scales_for(blocks.view(base.out_features, -1).abs().amax(dim=1))
    return _scales_of_rows(weight(base, torch.float32))


def _scales_of_rows(matrix: torch.Tensor) -> torch.Tensor:
    return scales_for(torch.linalg.vector_norm(matrix, float("inf"), dim=1))


def round_weight(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, s) of rows of a weight [rows, in]: what their products would round it to."""
    values, scales = torch.empty_like(matrix, dtype=E4M3), _scales_of_rows(matrix)
    _round_matrix(matrix, scales, values)
    return values, scales


def _stacked(bases: list[nn.Linear], *, transposed: bool = False) -> torch.Tensor:
    """V of all bases: e4m3 [all outputs, in], or [in, all outputs]; always rows of what is summed over."""
    if len(bases) == 1 and isinstance(bases[0], FP8Linear) and not transposed:
        return bases[0].weight
    rows_of, columns = _outputs(bases), bases[0].in_features
    shape = (columns, sum(rows_of)) if transposed else (sum(rows_of), columns)
    whole = torch.empty(shape, dtype=E4M3, device=bases[0].weight.device)
    by_output = whole.t() if transposed else whole
    for base, part, scales in zip(bases, by_output.split(rows_of), row_scales(bases).split(rows_of), strict=True):
        _put_values(base, scales, part)
    return whole


def _put_values(base: nn.Linear, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (e4m3 [out, in], any strides) with V."""
    if isinstance(base, FP8Linear):
        if out.is_cuda and not out.is_contiguous():
            _kernels().transpose(base.weight, out)
        else:
            out.copy_(base.weight)
    elif out.is_cuda and isinstance(base, NF4Linear) and base.is_as_kernels_read_it:
        _kernels().round_nf4(base.weight.view(torch.uint8).view(-1, 1), base.quant_state, scales, out)
    else:
        _round_matrix(weight(base, torch.bfloat16 if out.is_cuda else torch.float32), scales, out)


def _round_matrix(matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    if out.is_cuda:
        _kernels().round_matrix(matrix, scales, out)
    else:
        out.copy_(matrix.float() * scales.reciprocal().unsqueeze(1))


def _product(values, scales, weights, weight_scales, out, residual=None) -> torch.Tensor:
    """out = values weights^T times both scales (+ residual); values [T, k], weights [n, k], e4m3 and contiguous."""
    if values.is_cuda:
        scaled = {"scale_a": scales.unsqueeze(1), "scale_b": weight_scales.unsqueeze(0)}
        torch._scaled_mm(values, weights.t(), **scaled, out_dtype=out.dtype, use_fast_accum=True, out=out)
    else:
        sums = torch.float64 if out.dtype == torch.float64 else torch.float32
        product = values.to(sums) @ weights.to(sums).t()
        out.copy_(product * scales.unsqueeze(1) * weight_scales)
    return out if residual is None else out.add_(residual)
