"""A linear layer whose weight W is trained, multiplied in fp8 while it trains (`fitune.model.fp8`).

    y  = x W^T + bias    x and W rounded
    dx = dy W            dy rounded, W as it was for y
    dW = dy^T x          neither rounded: in the dtype of the computation, as is the bias's gradient

A step changes W, so each forward pass rounds it anew; one that recomputes finds the same numbers. Backward rounds it a
second time, by the scales that forward found: to keep what was rounded would hold a byte for each weight of a layer.
"""

import torch
from torch import nn

from fitune.model import fp8


class TrainedFP8Linear(nn.Linear):
    """`nn.Linear`, its parameters and all, but for its products in training; evaluations round nothing.

    Raises UsageError where sizes forbid fp8.
    """

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, **options)
        fp8.check_sizes(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, self.weight, self.bias) if self.training else super().forward(x)


class _Linear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out]."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        values, scales = fp8.round_weight(weight)
        y = fp8.multiply_rounded(_rows(x), values, scales, bias)
        ctx.save_for_backward(x, weight, scales)  # the weight where it lies: FSDP frees it there, and brings it back
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scales = ctx.saved_tensors
        dy = _rows(dy)
        dx = fp8.multiply_rounded_backward(dy, weight, scales).view_as(x)
        return dx, dy.t() @ _rows(x), dy.sum(0) if ctx.needs_input_grad[2] else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, channels], the channels side by side in memory."""
    return x.flatten(0, -2).contiguous()
