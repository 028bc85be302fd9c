"""Products of weights W that are trained, in fp8: those of the linears that read one input x, side by side.

    y_tn  = a_t s_n sum_i X_ti V_ni      x ~ a X, W ~ s V
    dx_ti = b_t sum_n Y_tn V_ni          dy s ~ b Y
    dW_ni = c_n sum_t Z_tn X_ti          dy a ~ c Z, c [all outputs]: a scale for each column

So x and W are rounded once, and both gradients are those of what forward computed: the scale that stands inside a sum
goes into dy before dy is rounded. Backward rounds W, which a step changes, and x again, by the scales that forward
found: to keep V and X would take a byte for each number of a layer.

dW is a sum over all tokens of a pass, most of one sign where x and dy have means. It is added up in float32: in the
fewer bits of `fast` it came out 10 % too small for 6,144 tokens, 73 % for 98,304 (means of two standard deviations:
benchmarks/fp8_sums.py).

The scales of Z are of all tokens of a pass, too. So which rows share a pass changes dW by what rounding does.
"""

import torch

from fitune.model.e4m3 import E4M3
from fitune.model.fp8_rounding import ones, product, quantise_columns, quantise_rows, round_columns, round_matrix


def multiply(
    x: torch.Tensor, weights: list[torch.Tensor], out: torch.Tensor, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = x W^T (+ residual), the weights stacked; x [T, in], out [T, all outputs], contiguous. Returns (a, s)."""
    (values, of_tokens), (stacked, of_outputs) = quantise_rows(x), _stacked(weights)
    product(values, of_tokens, stacked, of_outputs, out, residual)
    return of_tokens, of_outputs


def input_gradient(dy: torch.Tensor, weights: list[torch.Tensor], of_outputs: torch.Tensor) -> torch.Tensor:
    """dy W, [T, in]; dy [T, all outputs], and s."""
    rows, inputs = [len(weight) for weight in weights], weights[0].shape[1]
    transposed = torch.empty(inputs, sum(rows), dtype=E4M3, device=dy.device)
    by_weight = zip(weights, of_outputs.split(rows), transposed.t().split(rows), strict=True)
    for weight, scales, part in by_weight:
        round_matrix(weight, scales, part)
    return product(*quantise_rows(dy, of_outputs), transposed, ones(inputs, dy.device), dy.new_empty(len(dy), inputs))


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, of_tokens: torch.Tensor) -> torch.Tensor:
    """dW, [all outputs, in], from dy [T, all outputs], x [T, in] and a."""
    outputs, inputs = dy.shape[1], x.shape[1]
    columns, out = round_columns(x, of_tokens), dy.new_empty(outputs, inputs)
    return product(*quantise_columns(dy, of_tokens), columns, ones(inputs, dy.device), out, fast=False)


def _stacked(weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, s) of all weights."""
    if len(weights) == 1:
        return quantise_rows(weights[0])
    rows, (first, *_) = [len(weight) for weight in weights], weights
    values = torch.empty(sum(rows), first.shape[1], dtype=E4M3, device=first.device)
    scales = torch.empty(sum(rows), dtype=torch.float32, device=first.device)
    for weight, *out in zip(weights, values.split(rows), scales.split(rows), strict=True):
        quantise_rows(weight, out=out)
    return values, scales
