"""A layer's linears by the input they share: products with frozen weight and adapter, and the adapters' gradients."""

from types import ModuleType

import torch

from fitune.model import elementwise
from fitune.model.dropout import Dropout
from fitune.model.linears import ALL, Linears, Matrices, of_columns, part


class LoraLinears:
    """The linears of a layer for one pass: weights as they are now, adapters in the activations' dtype.

    `parameters` are those of `linears`; `products` multiplies with frozen weights, in bf16 (`fitune.model.products`) or
    in e4m3 (`fitune.model.fp8`). x [T, .] is the layer's input. `lows` [T, sum of the adapters' r] holds s x A^T of
    each group: forward fills it, the gradients read it.
    """

    def __init__(
        self,
        linears: Linears,
        parameters: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        products: ModuleType,
        lows: torch.Tensor | None = None,
    ):
        self.linears, self.parameters, self.products = linears, parameters, products
        self.adapters, self.layout = linears.adapters, linears.layout
        self.weights = self._in_dtype_of(x) if parameters else None
        self.sums: Matrices | None = None
        "The adapters' gradients."
        self.filled: set[int] = set()
        "The groups whose gradients hold some tokens'."
        self.lows = x.new_empty(x.shape[0], sum(self.layout.ranks)) if lows is None else lows
        self.low_of = dict(zip(self.adapters, self.lows.split(self.layout.ranks, 1), strict=True))

    def _in_dtype_of(self, x: torch.Tensor) -> Matrices:
        """The parameters, by one copy."""
        weights = self.layout.room("weights", x.dtype, x.device)
        torch._foreach_copy_(weights.of_parameters, list(self.parameters))
        return weights

    def wants_input(self, group: int) -> bool:
        """Whether gradients are computed from the group's input."""
        return group in self.adapters

    def multiply(self, group: int, x, dropped, rows: slice = ALL, *, residual=None, out=None) -> torch.Tensor:
        """x W'^T for the linears that read x, side by side; `dropped` is what their adapter reads.

        `rows`: which of the batch's tokens these are, here and below.
        """
        out = x.new_empty(x.shape[0], self.linears.width(group)) if out is None else out
        bases = self.linears.bases_of(group)
        if group not in self.adapters:
            self.products.multiply(x, bases, out, residual)
        elif self.products.ADDS_IN_PLACE:
            self._put_up(out, group, self.fill_low(group, dropped, rows), residual)
            self.products.multiply(x, bases, out, out)
        else:
            self.products.multiply(x, bases, out)
            self._put_up(out, group, self.fill_low(group, dropped, rows), residual, add=True)
        self.linears.add_biases(group, out)
        return out

    def _put_up(self, out, group: int, low, residual, *, add: bool = False) -> None:
        """out (+)= low B^T (+ residual)."""
        adapter, stacked = self.adapters[group], self.weights.stacked_up[group]
        if out.is_cuda and stacked is not None:
            from fitune.model import low_rank_triton

            if low_rank_triton.can_fill(adapter.widths):
                low_rank_triton.fill(out, low, stacked, adapter.widths, residual=residual, add=add)
                return
        if not add:
            out.copy_(residual) if residual is not None else out.zero_()
        elif residual is not None:
            out.add_(residual)
        by_linear = self.linears.by_linear(group, out)
        for index, up in self.weights.ups[group].items():
            by_linear[index].addmm_(of_columns(low, adapter.ranks[index]), up.t())

    def multiply_backward(
        self, group: int, dy, dropped, dropout: Dropout | None, rows: slice = ALL, *, low=None, need_dx: bool = True
    ) -> torch.Tensor | None:
        """The gradient of x from dy [T, all outputs of the group]; the adapter's own too if `dropped` is there.

        `low`: `low_gradient` of dy, if it is known.
        """
        bases = self.linears.bases_of(group)
        if group not in self.adapters:
            return self.products.multiply_backward(dy, bases) if need_dx else None
        if dropped is not None:
            low = self.add_gradients(group, dy, dropped, rows, low)
        elif low is None:
            low = self.low_gradient(group, dy)
        if not need_dx:
            return None
        if self.products.ADDS_IN_PLACE:
            dx = dy.new_empty(dy.shape[0], bases[0].in_features)
            self._put_down(dx, group, low, dropout)
            return self.products.multiply_backward(dy, bases, dx)
        dx = self.products.multiply_backward(dy, bases)
        self._put_down(dx, group, low, dropout, add=True)
        return dx

    def _put_down(self, dx, group: int, low, dropout: Dropout | None, *, add: bool = False) -> None:
        """dx (+)= low A, with the dropout of the adapter's input."""
        if dx.is_cuda:
            from fitune.model import low_rank_triton

            down_t = self.weights.down_t[group]
            low_rank_triton.fill(dx, low, down_t, (dx.shape[1],), add=add, dropout=dropout)
            return
        product = elementwise.drop(low @ self.weights.down[group], dropout)
        dx.add_(product) if add else dx.copy_(product)

    def add_gradients(self, group: int, dy, dropped, rows: slice = ALL, low_gradient=None):
        """Adds those of A and B for these tokens; `dropped` [T, in] is what A reads.

        Returns `low_gradient` of dy, found here if it is not given; None without an adapter.
        """
        if group not in self.adapters:
            return None
        sums, low = self._sums(group, dropped), self._low(group, rows)
        found = self._gradients_by_one_reading(group, dy, low, sums) if low_gradient is None else None
        if found is None:
            found = self.low_gradient(group, dy) if low_gradient is None else low_gradient
            adapter, by_linear = self.adapters[group], self.linears.by_linear(group, dy)
            for index, up in sums.ups[group].items():
                self._put(up, by_linear[index].t(), of_columns(low, adapter.ranks[index]), group)
        self._put(sums.down[group], found.t(), dropped, group)
        self.filled.add(group)
        return found

    def _gradients_by_one_reading(self, group: int, dy, low, sums: Matrices) -> torch.Tensor | None:
        """Puts that of B and returns `low_gradient`; None where two readings for each linear are the way."""
        up = self.weights.stacked_up[group]
        if not dy.is_cuda or up is None:
            return None
        from fitune.model import up_gradients_triton

        widths = self.adapters[group].widths
        if not up_gradients_triton.worth(dy, widths, up.shape[1]):
            return None
        scaling, add = self.linears.scaling(group), group in self.filled
        return up_gradients_triton.gradients(dy, low, up, widths, scaling, out=sums.stacked_up[group], add=add)

    def gradients(self) -> list[torch.Tensor | None]:
        """Of the parameters, in their order and dtype; None for all if they were added to those of earlier passes.

        Autograd would add one after the other: for seven adapters 14 kernels in place of one. So this is for
        `backward()` alone: `torch.autograd.grad` and hooks of gradients see nothing of later passes.
        """
        if not self.parameters:
            return []
        earlier = self.layout.tensor_of([parameter.grad for parameter in self.parameters])
        if earlier is not None:
            earlier.add_(self.sums.flat)
            return [None] * len(self.parameters)
        flat = self.sums.flat.to(self.parameters[0].dtype, copy=True)
        return [place.of(flat) for place in self.layout.places]

    def fill_low(self, group: int, dropped: torch.Tensor, rows: slice = ALL) -> torch.Tensor | None:
        """s x A^T of these tokens, [T, sum of the group's ranks]; None without an adapter."""
        if group not in self.adapters:
            return None
        down_t = self.weights.down_t[group]
        return self._low(group, rows).addmm_(dropped, down_t, beta=0, alpha=self.linears.scaling(group))

    def _low(self, group: int, rows: slice) -> torch.Tensor:
        return part(self.low_of[group], rows)

    def low_gradient(self, group: int, dy) -> torch.Tensor | None:
        """The gradient of x A^T, [T, sum of ranks], from dy [T, all outputs of the group]; None without an adapter."""
        if group not in self.adapters:
            return None
        adapter, scaling = self.adapters[group], self.linears.scaling(group)
        low, by_linear = dy.new_empty(dy.shape[0], adapter.down.rows), self.linears.by_linear(group, dy)
        for index, up in self.weights.ups[group].items():
            of_columns(low, adapter.ranks[index]).addmm_(by_linear[index], up, beta=0, alpha=scaling)
        return low

    def _sums(self, group: int, like: torch.Tensor) -> Matrices:
        """Where the group's are added up: in the dtype of products, or of sums once a second tile of tokens comes."""
        if self.sums is None:
            self.sums = self.layout.room("gradients", like.dtype, like.device)
        elif group in self.filled and self.sums.flat.dtype != elementwise.wide_dtype(like.dtype):
            narrow = self.sums
            self.sums = self.layout.room("gradients", elementwise.wide_dtype(like.dtype), like.device)
            self.sums.flat.copy_(narrow.flat)
        return self.sums

    def _put(self, target: torch.Tensor, a: torch.Tensor, b: torch.Tensor, group: int) -> None:
        """target (+)= a b."""
        if group in self.filled:
            target.add_(a @ b)
        elif target.dtype == a.dtype:
            torch.mm(a, b, out=target)
        else:
            target.copy_(a @ b)
