"""A Llama decoder layer over a frozen base with LoRA, forward and backward written out as one autograd function.

    n1  = norm(x)                 T tokens, h hidden, k of keys and values, i intermediate; [T, .] throughout
    q, k, v = n1 Wq', n1 Wk', n1 Wv'     W' stands for W + s B A: the frozen weight and its adapter
    o   = attention(rope(q), rope(k), v)        q has h channels too, unless config.json gives heads another size
    mid = x + o Wo'
    n2  = norm(mid)
    y   = mid + (silu(n2 Wgate') * n2 Wup') Wdown'

Mistral's layer is the same. Those of Qwen2 and some Llamas add a frozen bias to products; Qwen3 norms each head of q
and k before it is rotated.

A kept layer saves x, q, k, v, o, mid, gate and up: (4 h + 2 k + 2 i) values a token. A recomputed one saves x. What is
cheap is computed again in both: norms, the activation, dropout. A frozen weight has no gradient; NF4 weights are
dequantised just before each product (`fitune.model.products`, or in e4m3 `fitune.model.fp8`). The MLP goes through
`MLP_TILE` tokens at a time, so its working memory does not grow with the batch.

Parameters stay where PEFT put them, under PEFT's names, and FSDP gathers and frees them as before: this module only
replaces what is computed.
"""

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import save_on_cpu

from fitune.config.tiles import MLP_TILE
from fitune.model import attention, elementwise, fp8, products
from fitune.model.elementwise import Dropout

QKV, OUT, GATE_UP, DOWN = range(4)  # the four inputs of linears, each with an adapter product and a dropout of its own


@dataclass(frozen=True)
class Adapter:
    """LoRA of the linears that share an input, stacked along the rank: a = s x A^T, out_n += a_n B_n^T."""

    down: torch.Tensor
    "A, [sum of ranks, in]."
    ups: list[tuple[int, torch.Tensor, slice]]
    "(which of the linears, its B [out, r], its rows of A)"
    scaling: float


@dataclass(frozen=True)
class Batch:
    """What all layers of a forward pass share."""

    cos: torch.Tensor
    "[T, head_dim], as sin."
    sin: torch.Tensor
    bounds: torch.Tensor
    "int32 [examples + 1]: where each example of the flattened rows starts and the last one ends."
    longest: int
    dropout_keys: torch.Tensor | None
    "int32 [T]."


class DecoderLayer(nn.Module):
    """Put before transformers' class of a layer: the same submodules, computed as above.

    With a key-value cache, as in generation, it computes as ever.
    """

    keep = False
    "Whether what the backward pass needs is kept instead of recomputed."
    offload = False
    "Whether what is kept waits in host RAM."
    fp8 = False
    "Whether training multiplies frozen weights in e4m3. Evaluation never does: the result is to be used without."

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        dropout_keys: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """[rows, length, h] -> the same. Rows that are not packed must have their padding on the right."""
        if past_key_values is not None:
            return super().forward(
                hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
            )
        rows, length, _ = hidden_states.shape
        if cu_seq_lens_q is None:
            cu_seq_lens_q, max_length_q = attention.bounds_of_rows(rows, length, hidden_states.device), length
        attention.check_bounds(cu_seq_lens_q, max_length_q, hidden_states.device)
        cos, sin = (angle.expand(rows, -1, -1).reshape(rows * length, -1) for angle in position_embeddings)
        batch = Batch(cos, sin, cu_seq_lens_q, max_length_q, dropout_keys)
        parameters = [parameter for linear in self.linears() for parameter in _adapter_of(linear)]
        with save_on_cpu(pin_memory=hidden_states.is_cuda) if self.offload else nullcontext():
            return _Function.apply(hidden_states, self, batch, *parameters)

    def head_norms(self) -> list[nn.Module]:
        """Of the heads of q and k, [] where there are none."""
        a = self.self_attn
        return [a.q_norm, a.k_norm] if hasattr(a, "q_norm") else []

    def linears(self) -> list[nn.Module]:
        """q, k, v, o, gate, up, down."""
        a, m = self.self_attn, self.mlp
        return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]

    def bases(self) -> list[nn.Linear]:
        """The same without their adapters."""
        return [linear.base_layer if isinstance(linear, LoraLayer) else linear for linear in self.linears()]


GROUPS = {QKV: (0, 1, 2), OUT: (3,), GATE_UP: (4, 5), DOWN: (6,)}
"The linears of each shared input, by their place in `DecoderLayer.linears`."


def _adapter_of(linear: nn.Module) -> list[nn.Parameter]:
    """[A, B] of a linear's active adapter, [] without."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return []
    [name] = linear.active_adapters
    return [linear.lora_A[name].weight, linear.lora_B[name].weight]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer: DecoderLayer, batch: Batch, *parameters):
        """x [rows, length, h] -> the same. `parameters` are those of `_adapter_of`, linear by linear."""
        work, y = _Work(layer, batch, parameters, x.dtype), torch.empty_like(x)
        x = x.flatten(0, 1)
        mid, attended = work.attend(x)
        gate_up = work.mlp(mid, y.flatten(0, 1), keep=layer.keep)
        ctx.work_of = layer, batch, parameters  # weights: FSDP brings them back where they were
        ctx.save_for_backward(x, *((*attended, mid, gate_up) if layer.keep else ()))
        return y

    @staticmethod
    def backward(ctx, dy):
        layer, batch, parameters = ctx.work_of
        x, *kept = ctx.saved_tensors
        work = _Work(layer, batch, parameters, x.dtype)
        if kept:
            *attended, mid, gate_up = kept
        else:
            mid, attended = work.attend(x)
            gate_up = None
        dmid = work.mlp_backward(dy.flatten(0, 1).contiguous(), mid, gate_up)
        del kept, mid, gate_up
        dx = work.attend_backward(dmid, x, attended, need_dx=ctx.needs_input_grad[0])
        return dx if dx is None else dx.view_as(dy), None, None, *work.gradients()


class _Work:
    """One pass through one layer: its weights as they are now, its adapter in the activations' dtype."""

    def __init__(self, layer: DecoderLayer, batch: Batch, parameters, dtype: torch.dtype):
        self.layer, self.batch = layer, batch
        self.linears = layer.linears()
        self.bases = layer.bases()
        self.products = fp8 if layer.fp8 and layer.training else products
        self.parameters = parameters
        with_adapter = [index for index, linear in enumerate(self.linears) if _adapter_of(linear)]
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

    def dropout(self, group: int) -> Dropout | None:
        if group not in self.adapters or not self.layer.training:
            return None
        linear = self.linears[self.adapters[group].ups[0][0]]
        p = getattr(linear.lora_dropout[linear.active_adapters[0]], "p", 0.0)
        if not p:
            return None
        if self.batch.dropout_keys is None:
            raise ValueError("lora.dropout needs dropout_keys beside the batch: see fitune.model.dropout_keys")
        return Dropout(p, self.batch.dropout_keys, self.layer.self_attn.layer_idx * len(GROUPS) + group + 1)

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """(mid, what the backward pass needs beside x) of the attention half."""
        layer, batch = self.layer, self.batch
        dropout = self.dropout(QKV)
        norm = layer.input_layernorm
        normed, dropped = elementwise.rms_norm(x, norm.weight, norm.variance_epsilon, dropout)
        qkv = self._products(QKV, normed, dropped)
        query, key, value = self._heads_for_attention(qkv, rotated=False)
        examples = batch.bounds, batch.longest
        attended, statistics = attention.forward(query, key, value, *examples, layer.self_attn.scaling)
        attended = attended.reshape(x.shape[0], -1)
        dropped = elementwise.drop(attended, self.dropout(OUT))
        mid = self._products(OUT, attended, dropped, residual=x)
        return mid, (qkv, attended, *statistics)

    def attend_backward(self, dmid: torch.Tensor, x: torch.Tensor, saved, *, need_dx: bool) -> torch.Tensor | None:
        layer, batch = self.layer, self.batch
        qkv, attended, *statistics = saved
        dropout = self.dropout(OUT)
        dattended, more = self._products_backward(OUT, [dmid], elementwise.drop(attended, dropout), dropout)
        if more is not None:
            elementwise.add_dropped_(dattended, more, dropout)
            del more
        query, key, value = self._heads_for_attention(qkv, rotated=True)
        gradients = attention.backward(
            dattended.view_as(query), query, key, value, attended.view_as(query), statistics, batch.bounds,
            batch.longest, layer.self_attn.scaling,
        )  # fmt: skip
        del dattended
        for heads in gradients[:2]:
            elementwise.rope_(heads, batch.cos, batch.sin, backward=True)
        gradients = [gradient.reshape(x.shape[0], -1) for gradient in self._head_norms_backward(gradients, qkv)]
        dropout, norm = self.dropout(QKV), layer.input_layernorm
        dropped = None
        if QKV in self.adapters:
            dropped = elementwise.rms_norm(x, norm.weight, norm.variance_epsilon, dropout)[1]
        dnormed, more = self._products_backward(QKV, gradients, dropped, dropout, need_dx=need_dx)
        if not need_dx:
            return None
        return elementwise.rms_norm_backward(dnormed, more, x, norm.weight, norm.variance_epsilon, dropout, dmid)

    def mlp(self, mid: torch.Tensor, y: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
        """Fills y [T, h], tile by tile; returns gate and up if they are kept."""
        gate_up = mid.new_empty(mid.shape[0], self._width(GATE_UP)) if keep else None
        for start, stop in _tiles(mid.shape[0]):
            rows = slice(start, stop)
            tile, _ = self._gate_up(mid[rows], start, out=gate_up[rows] if keep else None)
            product, dropped = elementwise.swiglu(tile, self._dropout_of(DOWN, start, stop))
            self._products(DOWN, product, dropped, residual=mid[rows], out=y[rows])
        return gate_up

    def mlp_backward(self, dy: torch.Tensor, mid: torch.Tensor, gate_up: torch.Tensor | None) -> torch.Tensor:
        """The gradient of mid. Overwrites `gate_up`."""
        norm, dmid = self.layer.post_attention_layernorm, torch.empty_like(mid)
        for start, stop in _tiles(mid.shape[0]):
            rows = slice(start, stop)
            if gate_up is None:
                tile, dropped = self._gate_up(mid[rows], start)
            else:
                tile = gate_up[rows]
                dropped = self._norm_of_mid(mid[rows], start)[1] if GATE_UP in self.adapters else None
            down, width = self._dropout_of(DOWN, start, stop), self._width(GATE_UP) // 2
            dproduct, more = self._products_backward(DOWN, [dy[rows]], None, down)
            product = elementwise.swiglu_backward_(dproduct, more, tile, down)
            del dproduct, more
            self._adapter_gradients(DOWN, [dy[rows]], product)
            del product
            first = self._dropout_of(GATE_UP, start, stop)
            halves = [tile[:, :width], tile[:, width:]]
            dnormed, more = self._products_backward(GATE_UP, halves, dropped, first)
            dmid[rows] = elementwise.rms_norm_backward(
                dnormed, more, mid[rows], norm.weight, norm.variance_epsilon, first, dy[rows]
            )
        return dmid

    def gradients(self) -> list[torch.Tensor]:
        """Of the parameters, in their order and dtype."""
        return [self.found[n].to(parameter.dtype) for n, parameter in enumerate(self.parameters)]

    def _gate_up(self, mid, start: int, out=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up, the dropped norm that their adapter reads)"""
        normed, dropped = self._norm_of_mid(mid, start)
        return self._products(GATE_UP, normed, dropped, out=out), dropped

    def _norm_of_mid(self, mid, start: int):
        norm, dropout = self.layer.post_attention_layernorm, self._dropout_of(GATE_UP, start, start + mid.shape[0])
        return elementwise.rms_norm(mid, norm.weight, norm.variance_epsilon, dropout)

    def _dropout_of(self, group: int, start: int, stop: int) -> Dropout | None:
        dropout = self.dropout(group)
        return dropout.rows(start, stop) if dropout else None

    def _bases(self, group: int) -> list[nn.Linear]:
        return [self.bases[index] for index in GROUPS[group]]

    def _width(self, group: int) -> int:
        return sum(base.out_features for base in self._bases(group))

    def _columns(self, group: int) -> dict[int, slice]:
        """Linear -> its columns of the group's output."""
        columns, start = {}, 0
        for index in GROUPS[group]:
            columns[index] = slice(start, start + self.bases[index].out_features)
            start = columns[index].stop
        return columns

    def _heads(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """q, k, v as views [T, heads, head_dim]."""
        size = self.layer.self_attn.head_dim
        return [qkv[:, columns].unflatten(1, (-1, size)) for columns in self._columns(QKV).values()]

    def _heads_for_attention(self, qkv: torch.Tensor, *, rotated: bool) -> list[torch.Tensor]:
        """q, k, v [T, heads, head_dim], q and k normed, where heads have norms, and rotated.

        Without norms they are rotated in place, once. With them qkv stays as the products gave it, which the norms'
        gradients need, and this is computed again in the backward pass.
        """
        query, key, value = self._heads(qkv)
        norms = self.layer.head_norms()
        if norms:
            query, key = (
                elementwise.norm_heads(heads, norm.weight, norm.variance_epsilon)
                for heads, norm in zip((query, key), norms, strict=True)
            )
        if norms or not rotated:
            for heads in (query, key):
                elementwise.rope_(heads, self.batch.cos, self.batch.sin)
        return [query, key, value]

    def _head_norms_backward(self, gradients: list[torch.Tensor], qkv: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of q, k, v as the products gave them, from those of the normed heads."""
        norms = self.layer.head_norms()
        if not norms:
            return gradients
        before = [
            elementwise.norm_heads_backward(gradient, heads, norm.weight, norm.variance_epsilon)
            for gradient, heads, norm in zip(gradients, self._heads(qkv), norms, strict=False)  # v has none
        ]
        return [*before, gradients[2]]

    def _products(self, group: int, x, dropped, *, residual=None, out=None) -> torch.Tensor:
        """x W'^T for the linears that read x, side by side; `dropped` is what their adapter reads."""
        out = x.new_empty(x.shape[0], self._width(group)) if out is None else out
        self.products.multiply(x, self._bases(group), out, residual)
        columns = self._columns(group)
        for index in GROUPS[group]:
            if self.bases[index].bias is not None:
                out[:, columns[index]] += self.bases[index].bias
        if group in self.adapters:
            adapter = self.adapters[group]
            low = dropped @ adapter.down.t()
            for index, up, rows in adapter.ups:
                out[:, columns[index]].addmm_(low[:, rows], up.t(), alpha=adapter.scaling)
        return out

    def _products_backward(self, group: int, dys, dropped, dropout: Dropout | None, *, need_dx: bool = True):
        """(gradient of x, gradient of its dropped copy or None); the adapter's own if `dropped` is there.

        Without dropout the first holds both.
        """
        dx = self.products.multiply_backward(dys, self._bases(group)) if need_dx else None
        if group not in self.adapters:
            return dx, None
        low = self._low_gradient(group, dys)
        if dropped is not None:
            self._adapter_gradients(group, dys, dropped, low)
        if not need_dx:
            return None, None
        if dropout is not None:
            return dx, low @ self.adapters[group].down
        return dx.addmm_(low, self.adapters[group].down), None

    def _low_gradient(self, group: int, dys) -> torch.Tensor:
        """The gradient of x A^T, [T, sum of ranks]."""
        adapter = self.adapters[group]
        low = dys[0].new_empty(dys[0].shape[0], adapter.down.shape[0])
        for index, up, rows in adapter.ups:
            torch.mm(dys[index - GROUPS[group][0]], up, out=low[:, rows])
        return low.mul_(adapter.scaling)

    def _adapter_gradients(self, group: int, dys, dropped: torch.Tensor, low: torch.Tensor | None = None) -> None:
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


def _tiles(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + MLP_TILE, tokens)) for start in range(0, tokens, MLP_TILE)]


def _cast(parameters, dtype: torch.dtype) -> list[torch.Tensor]:
    """All in `dtype`, by one copy."""
    if not parameters or parameters[0].dtype == dtype:
        return list(parameters)
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    cast = [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]
    torch._foreach_copy_(cast, list(parameters))
    return cast


def use_fp8_products(model: nn.Module) -> None:
    """Has a model's decoder layers train in fp8. Raises UsageError where sizes forbid it."""
    for layer in model.model.layers:
        for base in layer.bases():
            fp8.check_sizes(base)
        layer.fp8 = True


def use_written_out_layers(model: nn.Module) -> None:
    """Makes each decoder layer of a model a `DecoderLayer`."""
    for layer in model.model.layers:
        layer.__class__ = _written_out(type(layer))


@functools.cache
def _written_out(kind: type[nn.Module]) -> type[nn.Module]:
    """transformers' class of a layer with `DecoderLayer` before it."""
    return type(f"WrittenOut{kind.__name__}", (DecoderLayer, kind), {})
