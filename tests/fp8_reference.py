"""Rounding to fp8 without fitune's code and without the dtype, and what models that round have to have in common."""

import copy

import torch
from peft.tuners.lora import LoraLayer
from rounding import distance

from fitune.model.linears import GROUPS
from fitune.model.skeleton import decoder


def rounded_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Without the dtype: to the nearest multiple of an eighth of the power of two below, but of 2**-9 at least."""
    exponent = torch.frexp(x.double()).exponent - 1
    step = torch.exp2(exponent.double().clamp(min=-6) - 3)
    return torch.round(x.double() / step) * step


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of x rounded so that the largest is 448, their scales) in float64."""
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    return rounded_to_e4m3(x * (1 / scales)), scales.double()


def assert_equal_bits(models: list[dict[str, torch.Tensor]], unrounded: dict[str, torch.Tensor]) -> None:
    """Of all tensors, by name, in each of the models, whose logits rounding has moved away from `unrounded`'s."""
    expected, *others = models
    assert 0.001 < distance(expected["logits"], unrounded["logits"]) < 0.2
    for found in others:
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def rounding_in_autograd(model):
    """Plain transformers, and PEFT if there is an adapter, with the same rounding."""
    model = copy.deepcopy(model)
    for layer in decoder(model).model.layers:
        a, m = layer.self_attn, layer.mlp
        linears = [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
        for members in GROUPS.values():
            group, results = [], {}
            for linear in (linears[index] for index in members):
                if isinstance(linear, LoraLayer):
                    linear.base_layer = _Shared(linear.base_layer, group, results)
                else:
                    parent = a if linear in a.children() else m
                    [name] = [name for name, child in parent.named_children() if child is linear]
                    setattr(parent, name, _Shared(linear, group, results))
    return model


class _Rounded(torch.autograd.Function):
    """All linears of one input: y_n = x W_n^T, of rounded rows; their gradients are rounded together.

    Backward multiplies by the rounded W and by the rounded x.
    """

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.shape, ctx.weights, ctx.x = x.shape, [scaled(weight) for weight in weights], scaled(x.flatten(0, -2))
        values, scales = ctx.x
        products = [(values * scales) @ (v * s).t() for v, s in ctx.weights]
        return tuple(product.view(*x.shape[:-1], -1) for product in products)

    @staticmethod
    def backward(ctx, *dys):
        inputs, of_tokens = ctx.x
        of_rows = torch.cat([s for _, s in ctx.weights]).t().float()
        dy = torch.cat([dy.flatten(0, -2) for dy in dys], 1).float()
        values, scales = scaled(dy * of_rows)
        dx = (values * scales) @ torch.cat([v for v, _ in ctx.weights])
        columns, of_columns = scaled((dy * of_tokens.float()).t())
        of_weights = ((columns * of_columns) @ inputs).split([len(v) for v, _ in ctx.weights])
        return dx.view(ctx.shape), *of_weights


class _Shared(torch.nn.Module):
    """One linear of those that read an input; the first to be called computes all."""

    def __init__(self, linear, group: list, results: dict):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear, self.group, self.results = linear, group, results
        self.group.append(self)

    def forward(self, x):
        if self is self.group[0]:
            products = _Rounded.apply(x, *[member.linear.weight for member in self.group])
            self.results.update(zip(map(id, self.group), products, strict=True))
        product = self.results.pop(id(self))
        return product if self.linear.bias is None else product + self.linear.bias
