"""Products with a weight in fp8: y = x W^T and dx = dy W of numbers rounded to e4m3, summed in float32.

    x  ~ a X     X [T, in] in e4m3, a [T]: a scale for each token, so that its largest value becomes 448
    W  ~ s V     V [out, in] in e4m3, s [out]: a scale for each row
    y_tn  = a_t s_n sum_i X_ti V_ni
    dx_ti = b_t sum_n Y_tn V_ni          Y ~ dy s / b, b [T]

A scale must stand outside the sum it belongs to. Forward sums over a row of W, so its scale can. Backward sums over the
rows: there their scales go into dy before it is rounded. So both use one V and one s, and dx is the gradient of what
forward computed.

The linears that read one input are one product: q, k and v, gate and up. `fitune.model.fp8_rounding` rounds and
multiplies.

NF4 weights become V just before each product. Those of method lora are kept as V and s (`fitune.model.fp8_linear`).
Forward takes V as it lies where one linear reads the input. Of several the bytes are copied into one matrix, which
moves two thirds of what rounding bf16 does: products apart would be smaller, and their bits might be others than with
weights rounded on the way. Backward adds up over the rows of all linears, and `torch._scaled_mm` wants what it sums
over side by side in memory, so there V is transposed into one matrix.

Weights that are trained are rounded on the way, too; their gradients are products in fp8: `fitune.model.trained_fp8`.

A NaN stays a NaN. An infinite value makes its token's results NaN. Finite values do not overflow.
"""

import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import nn

from fitune.errors import UsageError
from fitune.model.e4m3 import E4M3, scales_for
from fitune.model.fp8_linear import FP8Linear
from fitune.model.fp8_rounding import MULTIPLE, kernels, ones, product, put, quantise_rows, round_matrix
from fitune.model.nf4 import NF4Linear
from fitune.model.products import weight

ADDS_IN_PLACE = False
"See `fitune.model.products`."


def check_sizes(base: nn.Linear) -> None:
    """Raises UsageError for a linear that cannot be multiplied in fp8."""
    if base.in_features % MULTIPLE or base.out_features % MULTIPLE:
        raise UsageError(
            f"profile.compute fp8 needs linears whose sizes are multiples of {MULTIPLE}, here is one of "
            f"{base.out_features} x {base.in_features}; use --set profile.compute=bf16"
        )


def multiply(
    x: torch.Tensor, bases: list[nn.Linear], out: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """out = x W^T (+ residual), the weights of `bases` stacked; x [T, in], out [T, all their outputs], contiguous."""
    values, scales = quantise_rows(x)
    return product(values, scales, _stacked(bases), row_scales(bases), out, residual)


def multiply_backward(dy: torch.Tensor, bases: list[nn.Linear]) -> torch.Tensor:
    """dy W, [T, in]; dy [T, all outputs of `bases`]."""
    transposed = _stacked(bases, transposed=True)
    values, scales = quantise_rows(dy, row_scales(bases))
    out = dy.new_empty(dy.shape[0], bases[0].in_features)
    return product(values, scales, transposed, ones(bases[0].in_features, scales.device), out)


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
    round_matrix(matrix, scales, values)
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
        put(base.weight, out)
    elif out.is_cuda and isinstance(base, NF4Linear) and base.is_as_kernels_read_it:
        kernels().round_nf4(base.weight.view(torch.uint8).view(-1, 1), base.quant_state, scales, out)
    else:
        round_matrix(weight(base, torch.bfloat16 if out.is_cuda else torch.float32), scales, out)
