"""A layer's linears by the input they share: products with frozen weight and adapter, and the adapters' gradients."""

from dataclasses import dataclass
from types import ModuleType

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fitune.model import elementwise
from fitune.model.dropout import Dropout

QKV, OUT, GATE_UP, DOWN = range(4)  # the four inputs of linears, each with an adapter product and a dropout of its own
GROUPS = {QKV: (0, 1, 2), OUT: (3,), GATE_UP: (4, 5), DOWN: (6,)}
"The linears of each shared input, by their place in `DecoderLayer.linears`."


@dataclass(frozen=True)
class Adapter:
    """LoRA of the linears that share an input, stacked along the rank: a = s x A^T, out_n += a_n B_n^T."""

    down: torch.Tensor
    "A, [sum of ranks, in]."
    ups: list[tuple[int, torch.Tensor, slice]]
    "(which of the linears, its B [out, r], its rows of A)"
    scaling: float


def adapter_of(linear: nn.Module) -> list[nn.Parameter]:
    """[A, B] of a linear's active adapter, [] without."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return []
    [name] = linear.active_adapters
    return [linear.lora_A[name].weight, linear.lora_B[name].weight]


class LoraLinears:
    """The seven linears of a layer for one pass: weights as they are now, adapters in the activations' dtype.

    `parameters` are those of `adapter_of`, linear by linear; `products` multiplies with frozen weights, in bf16
    (`fitune.model.products`) or in e4m3 (`fitune.model.fp8`).
    """

    def __init__(
        self,
        linears: list[nn.Module],
        bases: list[nn.Linear],
        parameters: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        products: ModuleType,
    ):
        self.linears, self.bases, self.parameters, self.products = linears, bases, parameters, products
        with_adapter = [index for index, linear in enumerate(linears) if adapter_of(linear)]
        self.places = {index: 2 * n for n, index in enumerate(with_adapter)}  # linear -> its A among the parameters
        self.adapters = self._stack_adapters(dtype)
        self.found: dict[int, torch.Tensor] = {}

    def _stack_adapters(self, dtype: torch.dtype) -> dict[int, Adapter]:
        """By shared input; those without one are left out."""
        cast = _cast(self.parameters, dtype)
        adapters = {}
        for group, members in GROUPS.items():
            present = [index for index in members if index in self.places]
            if not present:
                continue
            downs = [cast[self.places[index]] for index in present]
            ups, start = [], 0
            for index, down in zip(present, downs, strict=True):
                ups.append((index, cast[self.places[index] + 1], slice(start, start + down.shape[0])))
                start += down.shape[0]
            linear = self.linears[present[0]]
            scaling = linear.scaling[linear.active_adapters[0]]
            adapters[group] = Adapter(torch.cat(downs) if len(downs) > 1 else downs[0], ups, scaling)
        return adapters

    def dropout_of(self, group: int) -> float:
        """The probability that an element of the group's input is dropped for its adapter; 0 without one."""
        if group not in self.adapters:
            return 0.0
        linear = self.linears[self.adapters[group].ups[0][0]]
        return getattr(linear.lora_dropout[linear.active_adapters[0]], "p", 0.0)

    def width(self, group: int) -> int:
        """Of the group's outputs side by side."""
        return sum(base.out_features for base in self._bases(group))

    def columns(self, group: int) -> dict[int, slice]:
        """Linear -> its columns of the group's output."""
        columns, start = {}, 0
        for index in GROUPS[group]:
            columns[index] = slice(start, start + self.bases[index].out_features)
            start = columns[index].stop
        return columns

    def multiply(self, group: int, x, dropped, *, residual=None, out=None) -> torch.Tensor:
        """x W'^T for the linears that read x, side by side; `dropped` is what their adapter reads."""
        out = x.new_empty(x.shape[0], self.width(group)) if out is None else out
        self.products.multiply(x, self._bases(group), out, residual)
        columns = self.columns(group)
        for index in GROUPS[group]:
            if self.bases[index].bias is not None:
                out[:, columns[index]] += self.bases[index].bias
        if group in self.adapters:
            adapter = self.adapters[group]
            low = dropped @ adapter.down.t()
            for index, up, rows in adapter.ups:
                out[:, columns[index]].addmm_(low[:, rows], up.t(), alpha=adapter.scaling)
        return out

    def multiply_backward(self, group: int, dys, dropped, dropout: Dropout | None, *, need_dx: bool = True):
        """(gradient of x, gradient of its dropped copy or None); the adapter's own if `dropped` is there.

        Without dropout the first holds both.
        """
        dx = self.products.multiply_backward(dys, self._bases(group)) if need_dx else None
        if group not in self.adapters:
            return dx, None
        low = self._low_gradient(group, dys)
        if dropped is not None:
            self.add_adapter_gradients(group, dys, dropped, low)
        if not need_dx:
            return None, None
        if dropout is not None:
            return dx, low @ self.adapters[group].down
        return dx.addmm_(low, self.adapters[group].down), None

    def add_adapter_gradients(self, group: int, dys, dropped: torch.Tensor, low: torch.Tensor | None = None) -> None:
        """Adds those of A and B for these tokens; `dropped` [T, in] is what A reads."""
        if group not in self.adapters:
            return
        adapter = self.adapters[group]
        low = self._low_gradient(group, dys) if low is None else low
        forward_low = dropped @ adapter.down.t()
        downs = low.t() @ dropped
        for index, _, rows in adapter.ups:
            up = (dys[index - GROUPS[group][0]].t() @ forward_low[:, rows]).mul_(adapter.scaling)
            for number, gradient in ((self.places[index], downs[rows]), (self.places[index] + 1, up)):
                before = self.found.get(number)
                self.found[number] = gradient if before is None else elementwise.wide(before).add_(gradient)

    def gradients(self) -> list[torch.Tensor]:
        """Of the parameters, in their order and dtype."""
        return [self.found[n].to(parameter.dtype) for n, parameter in enumerate(self.parameters)]

    def _bases(self, group: int) -> list[nn.Linear]:
        return [self.bases[index] for index in GROUPS[group]]

    def _low_gradient(self, group: int, dys) -> torch.Tensor:
        """The gradient of x A^T, [T, sum of ranks]."""
        adapter = self.adapters[group]
        low = dys[0].new_empty(dys[0].shape[0], adapter.down.shape[0])
        for index, up, rows in adapter.ups:
            torch.mm(dys[index - GROUPS[group][0]], up, out=low[:, rows])
        return low.mul_(adapter.scaling)


def _cast(parameters, dtype: torch.dtype) -> list[torch.Tensor]:
    """All in `dtype`, by one copy."""
    if not parameters or parameters[0].dtype == dtype:
        return list(parameters)
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    cast = [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]
    torch._foreach_copy_(cast, list(parameters))
    return cast
