"""A linear layer whose weight W is trained, multiplied in fp8 while it trains (`fitune.model.fp8`).

    y_tn  = a_t s_n sum_i X_ti V_ni + bias    x ~ a X, W ~ s V
    dx_ti = b_t sum_n Y_tn V_ni               dy s ~ b Y
    dW_ni = c_n sum_t Z_tn X_ti               dy a ~ c Z, c [out]: a scale for each column

So x and W are rounded once, and both gradients are those of what forward computed: the scale that stands inside a sum
goes into dy before dy is rounded. The bias's gradient is not rounded.

q, k and v share one X, gate and up another. X stays beside x until another input is rounded; backward needs it turned,
and keeps that in place of x. A step changes W, so each forward pass rounds it anew; one that recomputes finds the same
numbers. Backward rounds it a second time, by the scales that forward found: to keep V would take a byte for each weight
of a layer.

dW is a sum over all tokens of a pass, most of one sign where x and dy have means. It is added up in float32: in the
fewer bits of `fast` it came out 10 % too small for 6,144 tokens, 73 % for 98,304 (means of two standard deviations:
benchmarks/fp8_sums.py).

The scales of Z are of all tokens of a pass, too. So which rows share a pass changes dW by what rounding does.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import nn

from fitune.model import fp8
from fitune.model.e4m3 import E4M3
from fitune.model.fp8_rounding import ones, product, quantise_columns, quantise_rows, round_matrix, turned


class TrainedFP8Linear(nn.Linear):
    """`nn.Linear`, its parameters and all, but for its products in training; evaluations round nothing.

    Raises UsageError where sizes forbid fp8.
    """

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, **options)
        fp8.check_sizes(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, _rounded(x), self.weight, self.bias) if self.training else super().forward(x)


@dataclass(frozen=True)
class _Rounded:
    """x [T, in] as its products read it."""

    values: torch.Tensor
    "X, [T, in]."
    columns: torch.Tensor
    "The same, [in, T]."
    scales: torch.Tensor
    "a, float32 [T]."
    version: int
    "Of x."


_last_input: weakref.ref | None = None
"That was rounded."


@torch.no_grad()
def _rounded(x: torch.Tensor) -> _Rounded:
    """Kept beside x for the other linears that read it, until another input comes."""
    global _last_input
    found = getattr(x, "in_fp8", None)
    if found is None or found.version != x._version:
        last = _last_input and _last_input()
        if last is not None:
            last.in_fp8 = None
        values, scales = quantise_rows(_rows(x))
        found = x.in_fp8 = _Rounded(values, turned(values), scales, x._version)
        _last_input = weakref.ref(x)
    return found


class _Linear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out]."""

    @staticmethod
    def forward(ctx, x, rounded, weight, bias):
        values, scales = quantise_rows(weight)
        ctx.save_for_backward(rounded.columns, rounded.scales, scales, weight)  # where it lies: FSDP frees it there
        ctx.has_bias = bias is not None
        y = x.new_empty(*x.shape[:-1], len(weight))
        product(rounded.values, rounded.scales, values, scales, _rows(y), bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        columns, of_tokens, of_outputs, weight = ctx.saved_tensors
        shape, dy = dy.shape, _rows(dy)
        dx = _input_gradient(dy, weight, of_outputs).view(*shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return dx, None, _weight_gradient(dy, columns, of_tokens), dy.sum(0) if ctx.has_bias else None


def _input_gradient(dy: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[T, in] from dy [T, out], W [out, in] and its s."""
    outputs, inputs = weight.shape
    transposed = weight.new_empty(inputs, outputs, dtype=E4M3)
    round_matrix(weight, scales, transposed.t())
    return product(*quantise_rows(dy, scales), transposed, ones(inputs, dy.device), dy.new_empty(len(dy), inputs))


def _weight_gradient(dy: torch.Tensor, columns: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[out, in] from dy [T, out], X [in, T] and a."""
    inputs = len(columns)
    out = dy.new_empty(dy.shape[1], inputs)
    return product(*quantise_columns(dy, scales), columns, ones(inputs, dy.device), out, fast=False)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, channels], the channels side by side in memory."""
    return x.flatten(0, -2).contiguous()
