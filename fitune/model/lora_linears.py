"""A layer's linears by the input they share: products with frozen weight and adapter, and the adapters' gradients."""

from dataclasses import dataclass
from types import ModuleType

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fitune.model import elementwise
from fitune.model.dropout import Dropout

QKV, OUT, GATE_UP, DOWN = range(4)  # the four inputs of linears, each with an adapter product and a dropout of its own
ALL = slice(None)
GROUPS = {QKV: (0, 1, 2), OUT: (3,), GATE_UP: (4, 5), DOWN: (6,)}
"The linears of each shared input, by their place in `DecoderLayer.linears`."


@dataclass(frozen=True)
class Adapter:
    """LoRA of the linears that share an input, stacked along the rank: a = s x A^T, out_n += a_n B_n^T."""

    down: torch.Tensor
    "A, [sum of ranks, in]."
    ups: list[tuple[int, torch.Tensor, slice]]
    "(which of the linears, its B [out, r], its rows of A)"
    stacked_up: torch.Tensor | None
    "All B, [all outputs, r], if each linear of the input has one."
    scaling: float
    columns: slice
    "Of a, among those of all groups."


class Stacked:
    """The adapters of a layer, or their gradients, in one tensor: by shared input A of its linears, then their B."""

    def __init__(self, flat: torch.Tensor, parameters: tuple[torch.Tensor, ...], groups: dict[int, list[int]]):
        """`groups`: the places of each group's A among the parameters, in which B follows its A."""
        self.flat = flat
        self.parts: dict[int, torch.Tensor] = {}
        "By place among the parameters."
        self.downs: dict[int, torch.Tensor] = {}
        "By group: its A [sum of ranks, in]."
        self.ups: dict[int, torch.Tensor] = {}
        "By group: its B [sum of outputs, r], which all have one rank."
        start = 0
        for group, places in groups.items():
            first = start
            for place in [*places, *(place + 1 for place in places)]:
                stop = start + parameters[place].numel()
                self.parts[place] = flat[start:stop].view(parameters[place].shape)
                start = stop
            width = parameters[places[0]].shape[1]
            ranks = sum(parameters[place].shape[0] for place in places)
            between = first + ranks * width
            self.downs[group] = flat[first:between].view(ranks, width)
            self.ups[group] = flat[between:start].view(-1, ranks // len(places))


def adapter_of(linear: nn.Module) -> list[nn.Parameter]:
    """[A, B] of a linear's active adapter, [] without."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return []
    [name] = linear.active_adapters
    return [linear.lora_A[name].weight, linear.lora_B[name].weight]


class LoraLinears:
    """The seven linears of a layer for one pass: weights as they are now, adapters in the activations' dtype.

    `parameters` are those of `adapter_of`, linear by linear; `products` multiplies with frozen weights, in bf16
    (`fitune.model.products`) or in e4m3 (`fitune.model.fp8`). x [T, .] is the layer's input. `lows` [T, sum of all
    ranks] holds s x A^T of each group: forward fills it, the gradients read it.
    """

    def __init__(
        self,
        linears: list[nn.Module],
        bases: list[nn.Linear],
        parameters: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        products: ModuleType,
        lows: torch.Tensor | None = None,
    ):
        self.linears, self.bases, self.parameters, self.products = linears, bases, parameters, products
        with_adapter = [index for index, linear in enumerate(linears) if adapter_of(linear)]
        places = {index: 2 * n for n, index in enumerate(with_adapter)}  # linear -> its A among the parameters
        of_groups = {group: [places[m] for m in members if m in places] for group, members in GROUPS.items()}
        self.groups = {group: places for group, places in of_groups.items() if places}
        self.adapters = self._adapters(places, self._stack(x.dtype)) if parameters else {}
        self.gradient: Stacked | None = None
        self.filled: set[int] = set()
        "The groups whose gradients hold some tokens'."
        ranks = sum(adapter.down.shape[0] for adapter in self.adapters.values())
        self.lows = x.new_empty(x.shape[0], ranks) if lows is None else lows

    def _stack(self, dtype: torch.dtype) -> Stacked:
        """The parameters in `dtype`, by one copy."""
        size = sum(parameter.numel() for parameter in self.parameters)
        flat = torch.empty(size, dtype=dtype, device=self.parameters[0].device)
        stacked = Stacked(flat, self.parameters, self.groups)
        torch._foreach_copy_([stacked.parts[place] for place in range(len(self.parameters))], list(self.parameters))
        return stacked

    def _adapters(self, places: dict[int, int], stacked: Stacked) -> dict[int, Adapter]:
        """By shared input; those without one are left out."""
        adapters, width = {}, 0
        for group, down in stacked.downs.items():
            present = [index for index in GROUPS[group] if index in places]
            ups, start = [], 0
            for index in present:
                up = stacked.parts[places[index] + 1]
                ups.append((index, up, slice(start, start + up.shape[1])))
                start += up.shape[1]
            linear = self.linears[present[0]]
            scaling = linear.scaling[linear.active_adapters[0]]
            stacked_up = stacked.ups[group] if len(present) == len(GROUPS[group]) else None
            adapters[group] = Adapter(down, ups, stacked_up, scaling, slice(width, width + start))
            width += start
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

    def multiply(self, group: int, x, dropped, rows: slice = ALL, *, residual=None, out=None) -> torch.Tensor:
        """x W'^T for the linears that read x, side by side; `dropped` is what their adapter reads.

        `rows`: which of the batch's tokens these are, here and below.
        """
        out = x.new_empty(x.shape[0], self.width(group)) if out is None else out
        bases = self._bases(group)
        if group not in self.adapters:
            self.products.multiply(x, bases, out, residual)
        elif self.products.ADDS_IN_PLACE:
            self._put_up(out, group, self.fill_low(group, dropped, rows), residual)
            self.products.multiply(x, bases, out, out)
        else:
            self.products.multiply(x, bases, out)
            self._put_up(out, group, self.fill_low(group, dropped, rows), residual, add=True)
        for index, columns in self.columns(group).items():
            if self.bases[index].bias is not None:
                out[:, columns] += self.bases[index].bias
        return out

    def _put_up(self, out, group: int, low, residual, *, add: bool = False) -> None:
        """out (+)= low B^T (+ residual)."""
        adapter, columns = self.adapters[group], self.columns(group)
        if out.is_cuda and adapter.stacked_up is not None:
            from fitune.model import low_rank_triton

            widths = [self.bases[index].out_features for index in columns]
            if low_rank_triton.can_fill(widths):
                low_rank_triton.fill(out, low, adapter.stacked_up, widths, residual=residual, add=add)
                return
        if not add:
            out.copy_(residual) if residual is not None else out.zero_()
        elif residual is not None:
            out.add_(residual)
        for index, up, ranks in adapter.ups:
            out[:, columns[index]].addmm_(low[:, ranks], up.t())

    def multiply_backward(
        self, group: int, dy, dropped, dropout: Dropout | None, rows: slice = ALL, *, need_dx: bool = True
    ) -> torch.Tensor | None:
        """The gradient of x from dy [T, all outputs of the group]; the adapter's own too if `dropped` is there."""
        bases = self._bases(group)
        if group not in self.adapters:
            return self.products.multiply_backward(dy, bases) if need_dx else None
        low = self._low_gradient(group, dy)
        if dropped is not None:
            self.add_adapter_gradients(group, dy, dropped, rows, low)
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
        down = self.adapters[group].down
        if dx.is_cuda:
            from fitune.model import low_rank_triton

            low_rank_triton.fill(dx, low, down.t(), [dx.shape[1]], add=add, dropout=dropout)
            return
        product = elementwise.drop(low @ down, dropout)
        dx.add_(product) if add else dx.copy_(product)

    def add_adapter_gradients(self, group: int, dy, dropped, rows: slice = ALL, low_gradient=None) -> None:
        """Adds those of A and B for these tokens; `dropped` [T, in] is what A reads."""
        if group not in self.adapters:
            return
        if low_gradient is None:
            low_gradient = self._low_gradient(group, dy)
        adapter, low, columns = self.adapters[group], self._low(group, rows), self.columns(group)
        gradient = self._gradient(group, dropped)
        self._put(gradient.downs[group], low_gradient.t(), dropped, group)
        for (index, _, ranks), place in zip(adapter.ups, self.groups[group], strict=True):
            self._put(gradient.parts[place + 1], dy[:, columns[index]].t(), low[:, ranks], group)
        self.filled.add(group)

    def gradients(self) -> list[torch.Tensor]:
        """Of the parameters, in their order and dtype."""
        if not self.parameters:
            return []
        flat = self.gradient.flat.to(self.parameters[0].dtype)
        parts = Stacked(flat, self.parameters, self.groups).parts
        return [parts[place] for place in range(len(self.parameters))]

    def fill_low(self, group: int, dropped: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        """s x A^T of these tokens, [T, sum of the group's ranks]."""
        adapter, low = self.adapters[group], self._low(group, rows)
        return low.addmm_(dropped, adapter.down.t(), beta=0, alpha=adapter.scaling)

    def _low(self, group: int, rows: slice) -> torch.Tensor:
        return self.lows[rows, self.adapters[group].columns]

    def _low_gradient(self, group: int, dy) -> torch.Tensor:
        """The gradient of x A^T, [T, sum of ranks]."""
        adapter, columns = self.adapters[group], self.columns(group)
        low = dy.new_empty(dy.shape[0], adapter.down.shape[0])
        for index, up, ranks in adapter.ups:
            low[:, ranks].addmm_(dy[:, columns[index]], up, beta=0, alpha=adapter.scaling)
        return low

    def _gradient(self, group: int, like: torch.Tensor) -> Stacked:
        """Where the group's is added up: in the dtype of products, or of sums once a second tile of tokens comes."""
        if self.gradient is None:
            size = sum(parameter.numel() for parameter in self.parameters)
            self.gradient = Stacked(like.new_empty(size), self.parameters, self.groups)
        elif group in self.filled:
            self.gradient = Stacked(elementwise.wide(self.gradient.flat), self.parameters, self.groups)
        return self.gradient

    def _put(self, target: torch.Tensor, a: torch.Tensor, b: torch.Tensor, group: int) -> None:
        """target (+)= a b."""
        if group in self.filled:
            target.add_(a @ b)
        elif target.dtype == a.dtype:
            torch.mm(a, b, out=target)
        else:
            target.copy_(a @ b)

    def _bases(self, group: int) -> list[nn.Linear]:
        return [self.bases[index] for index in GROUPS[group]]
