"""A layer's seven linears by the input they share, and where their adapters lie in one tensor."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

QKV, OUT, GATE_UP, DOWN = range(4)  # the four inputs of linears, each with an adapter product and a dropout of its own
ALL = slice(None)
GROUPS = {QKV: (0, 1, 2), OUT: (3,), GATE_UP: (4, 5), DOWN: (6,)}
"The linears of each shared input, by their place among q, k, v, o, gate, up and down."


def part(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """x[rows]; x itself for all of them, without asking torch."""
    return x if rows is ALL else x[rows]


def of_columns(x: torch.Tensor, columns: slice) -> torch.Tensor:
    """x[:, columns]; x itself for all of them."""
    return x if columns.stop - columns.start == x.shape[1] else x[:, columns]


def base_of(linear: nn.Module) -> nn.Linear:
    """Without its adapter."""
    return linear.base_layer if isinstance(linear, LoraLayer) else linear


def adapter_of(linear: nn.Module) -> str | None:
    """The name of a linear's active adapter, None without."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return None
    [name] = linear.active_adapters
    return name


@dataclass(frozen=True, slots=True)
class Place:
    """Of a matrix in a flat tensor."""

    start: int
    rows: int
    columns: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The matrix, [rows, columns]; `flat` begins its storage."""
        return flat.as_strided((self.rows, self.columns), (self.columns, 1), self.start)


class Matrices:
    """One tensor with a layer's adapters, or their gradients, and its matrices: each found once, not in every pass."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, layout: "Layout", dtype: torch.dtype, device: torch.device):
        self.flat = torch.empty(layout.size, dtype=dtype, device=device)
        self.of_parameters = [place.of(self.flat) for place in layout.places]
        "Linear by linear A and B."
        self.down, self.down_t, self.ups, self.stacked_up = {}, {}, {}, {}
        for group, adapter in layout.adapters.items():
            self.down[group] = adapter.down.of(self.flat)
            self.down_t[group] = self.down[group].t()
            self.ups[group] = {index: up.of(self.flat) for index, up in adapter.ups.items()}
            self.stacked_up[group] = adapter.stacked_up and adapter.stacked_up.of(self.flat)


@dataclass(frozen=True)
class Adapter:
    """LoRA of the linears that share an input, stacked along the rank: a = s x A^T, out_n += a_n B_n^T."""

    down: Place
    "A, [sum of ranks, in]."
    ups: dict[int, Place]
    "Of each linear that has an adapter, its B [out, r]."
    stacked_up: Place | None
    "All B, [all outputs, r], if each linear of the input has one."
    ranks: dict[int, slice]
    "The columns of a that each linear's B reads."
    widths: tuple[int, ...]
    "The outputs of each linear that has an adapter."


@dataclass(frozen=True, eq=False)
class Layout:
    """The adapters of a layer in one tensor: by shared input A of its linears, then their B."""

    adapters: dict[int, Adapter]
    "By shared input; those without one are left out."
    places: tuple[Place, ...]
    "Of the parameters, linear by linear A and B."
    size: int
    ranks: tuple[int, ...]
    "Of the adapter of each shared input."

    @cache  # noqa: B019  layouts are few, and stay
    def room(self, purpose: str, dtype: torch.dtype, device: torch.device) -> Matrices:
        """The same for all layers: each fills it anew, and the GPU computes one after the other."""
        return Matrices(self, dtype, device)

    def tensor_of(self, matrices: list[torch.Tensor | None]) -> torch.Tensor | None:
        """The flat tensor whose `places` these are; None if they are not those of one."""
        first = matrices[0]
        if first is None or first.untyped_storage().nbytes() != self.size * first.element_size():
            return None
        start = first.untyped_storage().data_ptr()
        for matrix, place in zip(matrices, self.places, strict=True):
            if matrix is None or matrix.data_ptr() != start + place.start * first.element_size():
                return None
        return first.as_strided((self.size,), (1,), 0)


class Linears:
    """What all passes of a layer need to know of its linears, as long as these and their adapters stay."""

    def __init__(self, linears: list[nn.Module]):
        """`linears`: q, k, v, o, gate, up, down."""
        self.linears, self.bases = linears, [base_of(linear) for linear in linears]
        self.names = [adapter_of(linear) for linear in linears]
        pairs = [name and (linear.lora_A[name], linear.lora_B[name])
                 for name, linear in zip(self.names, linears, strict=True)]  # fmt: skip
        self.of_adapters = [module for pair in pairs if pair for module in pair]
        self.layout = _layout(tuple(pair and (pair[0].out_features, base.in_features, base.out_features)
                                    for pair, base in zip(pairs, self.bases, strict=True)))  # fmt: skip
        self.adapters = self.layout.adapters
        self.has_bias = any(base.bias is not None for base in self.bases)

    def are(self, linears: list[nn.Module]) -> bool:
        """Whether these are the same linears, with the same adapters switched on."""
        return self.linears == linears and self.names == [adapter_of(linear) for linear in linears]

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """A and B of each adapter, linear by linear, as they are now: FSDP exchanges them."""
        return tuple(module.weight for module in self.of_adapters)

    @cached_property
    def trained(self) -> list[tuple[int, str]]:
        """Method full's: the number of each linear and its `weight`, and again with its `bias` if it has one."""
        names = ((index, name) for index in range(len(self.bases)) for name in ("weight", "bias"))
        return [(index, name) for index, name in names if getattr(self.bases[index], name) is not None]

    def trained_parameters(self) -> list[torch.Tensor]:
        """As they are now."""
        return [getattr(self.bases[index], name) for index, name in self.trained]

    def add_biases(self, group: int, out: torch.Tensor) -> None:
        """To out [T, all outputs of the group]."""
        if self.has_bias:
            for index, columns in self.by_linear(group, out).items():
                if self.bases[index].bias is not None:
                    columns += self.bases[index].bias

    def by_linear(self, group: int, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Each linear's columns of x [T, all outputs of the group]."""
        widths = self.widths[group]
        return dict(zip(GROUPS[group], x.split(widths, 1) if len(widths) > 1 else [x], strict=True))

    def bases_of(self, group: int) -> list[nn.Linear]:
        """Those of the input's linears."""
        return [self.bases[index] for index in GROUPS[group]]

    def width(self, group: int) -> int:
        """Of the group's outputs side by side."""
        return sum(self.widths[group])

    @cached_property
    def widths(self) -> dict[int, list[int]]:
        """The outputs of each of the input's linears."""
        return {group: [base.out_features for base in self.bases_of(group)] for group in GROUPS}

    def scaling(self, group: int) -> float:
        """s of the group's adapter."""
        linear, name = self._first_adapter(group)
        return linear.scaling[name]

    @cached_property
    def dropouts(self) -> dict[int, float]:
        """The probability that an element of the group's input is dropped for its adapter."""
        first = {group: self._first_adapter(group) for group in self.adapters}
        return {group: getattr(linear.lora_dropout[name], "p", 0.0) for group, (linear, name) in first.items()}

    def _first_adapter(self, group: int) -> tuple[LoraLayer, str]:
        """Of the group's linears the first one that has an adapter, and its name there."""
        index = next(iter(self.adapters[group].ups))
        return self.linears[index], self.names[index]


@cache
def _layout(sizes: tuple[tuple[int, int, int] | None, ...]) -> Layout:
    """Of linears with an adapter of (rank, inputs, outputs) each, or none."""
    adapters, places, start = {}, {}, 0
    for group, members in GROUPS.items():
        present = [index for index in members if sizes[index]]
        if not present:
            continue
        first = start
        for index in present:
            rank, inputs, _ = sizes[index]
            places[index, "A"] = Place(start, rank, inputs)
            start += rank * inputs
        first_up, ups, ranks, wide = start, {}, {}, 0
        for index in present:
            rank, _, outputs = sizes[index]
            places[index, "B"] = ups[index] = Place(start, outputs, rank)
            start += outputs * rank
            ranks[index] = slice(wide, wide + rank)
            wide += rank
        stacked = None
        if len(present) == len(members) and len({sizes[index][0] for index in present}) == 1:
            stacked = Place(first_up, sum(sizes[index][2] for index in present), sizes[present[0]][0])
        down = Place(first, wide, sizes[present[0]][1])
        adapters[group] = Adapter(down, ups, stacked, ranks, tuple(sizes[index][2] for index in present))
    in_order = tuple(places[key] for key in sorted(places))
    return Layout(adapters, in_order, start, tuple(adapter.down.rows for adapter in adapters.values()))
