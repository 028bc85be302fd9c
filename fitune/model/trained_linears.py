"""A layer's linears by the input they share, where their weights are trained: products and all gradients."""

import torch

from fitune.model import products, trained_fp8
from fitune.model.elementwise import wide_dtype
from fitune.model.linears import ALL, GROUPS, Linears

Scales = dict[tuple[int, int | None], tuple[torch.Tensor, torch.Tensor]]
"""Of fp8, by shared input and the first of its tokens: what `trained_fp8.multiply` returned."""


class TrainedLinears:
    """The linears of a layer for one pass. Has the methods of `LoraLinears`, and no adapters.

    Of fp8 the backward pass needs the `scales` that the forward pass found; what it computes again finds them again.
    """

    def __init__(self, linears: Linears, *, in_fp8: bool, scales: Scales | None = None):
        self.linears, self.in_fp8 = linears, in_fp8
        self.scales: Scales = scales or {}
        self.sums: dict[tuple[int, str], torch.Tensor] = {}
        "Gradients, by `Linears.trained`: in float32 once a second tile of tokens comes."

    def wants_input(self, group: int) -> bool:
        """Whether gradients are computed from the group's input."""
        return True

    def multiply(self, group: int, x, dropped, rows: slice = ALL, *, residual=None, out=None) -> torch.Tensor:
        """x W^T (+ residual) for the linears that read x, side by side.

        `rows`: which of the batch's tokens these are, here and below.
        """
        out = x.new_empty(x.shape[0], self.linears.width(group)) if out is None else out
        if self.in_fp8:
            self.scales[group, rows.start] = trained_fp8.multiply(x, self._weights(group), out, residual)
        else:
            products.multiply(x, self.linears.bases_of(group), out, residual)
        self.linears.add_biases(group, out)
        return out

    def multiply_backward(
        self, group: int, dy, x, dropout, rows: slice = ALL, *, low=None, need_dx: bool = True
    ) -> torch.Tensor | None:
        """The gradient of x from dy [T, all outputs of the group]; those of weights and biases too if x is there."""
        if x is not None:
            self.add_gradients(group, dy, x, rows)
        if not need_dx:
            return None
        if self.in_fp8:
            return trained_fp8.input_gradient(dy, self._weights(group), self.scales[group, rows.start][1])
        return products.multiply_backward(dy, self.linears.bases_of(group))

    def add_gradients(self, group: int, dy, x, rows: slice = ALL, low=None) -> None:
        """Adds those of weights and biases for these tokens."""
        by_linear = self.linears.by_linear(group, dy)
        for index, columns in by_linear.items():
            if self.linears.bases[index].bias is not None:
                self._add((index, "bias"), columns.sum(0))
        if self.in_fp8:
            stacked = trained_fp8.weight_gradient(dy, x, self.scales[group, rows.start][0])
            for index, gradient in zip(GROUPS[group], stacked.split(self.linears.widths[group]), strict=True):
                self._add((index, "weight"), gradient)
            return
        for index, columns in by_linear.items():
            if (index, "weight") in self.sums:
                products.add(self._wide((index, "weight")), columns.t(), x)
            else:
                self.sums[index, "weight"] = columns.t() @ x

    def round_gradients(self) -> None:
        """To the dtype of weights: nothing comes to what is there already."""
        for index, name in self.sums:
            self.sums[index, name] = self.sums[index, name].to(self.linears.bases[index].weight.dtype)

    def gradients(self) -> list[torch.Tensor]:
        """Of `Linears.trained`, in their order. Those of tiles must be rounded before."""
        return [self.sums[key] for key in self.linears.trained]

    def low_gradient(self, group: int, dy) -> None:
        """Nothing, as there is no adapter; so too below."""

    def fill_low(self, group: int, x, rows: slice = ALL) -> None: ...

    def _weights(self, group: int) -> list[torch.Tensor]:
        return [base.weight for base in self.linears.bases_of(group)]

    def _add(self, key: tuple[int, str], gradient: torch.Tensor) -> None:
        self.sums[key] = self._wide(key).add_(gradient) if key in self.sums else gradient

    def _wide(self, key: tuple[int, str]) -> torch.Tensor:
        """The sum, in the dtype of sums from now on."""
        self.sums[key] = self.sums[key].to(wide_dtype(self.sums[key].dtype))
        return self.sums[key]
