"""The attention half and the MLP half of a decoder layer, each forward and backward.

`fitune.model.layer` has the formulas, what is kept, and the names of sizes: T tokens, h hidden.
"""

from dataclasses import dataclass

import torch
from torch import nn

from fitune.config.tiles import MLP_TILE
from fitune.model import attention, elementwise, fp8, products
from fitune.model.dropout import Dropout
from fitune.model.lora_linears import DOWN, GATE_UP, GROUPS, OUT, QKV, LoraLinears


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


class LayerPass:
    """One pass through one layer, a `fitune.model.layer.DecoderLayer`, of tokens x [T, h].

    `lows` are those of the forward pass (`LoraLinears.lows`), if they were kept.
    """

    def __init__(
        self,
        layer: nn.Module,
        batch: Batch,
        parameters: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        lows: torch.Tensor | None = None,
    ):
        self.layer, self.batch = layer, batch
        multiplication = fp8 if layer.fp8 and layer.training else products
        self.linears = LoraLinears(layer.linears(), layer.bases(), parameters, x, multiplication, lows)

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """(mid, what the backward pass needs beside x) of the attention half."""
        layer, batch = self.layer, self.batch
        dropout = self._dropout(QKV)
        norm = layer.input_layernorm
        normed, dropped = elementwise.rms_norm(x, norm.weight, norm.variance_epsilon, dropout)
        qkv = self.linears.multiply(QKV, normed, dropped)
        query, key, value = self._heads_for_attention(qkv, rotated=False)
        examples = batch.bounds, batch.longest
        attended, statistics = attention.forward(query, key, value, *examples, layer.self_attn.scaling)
        attended = attended.reshape(x.shape[0], -1)
        dropped = elementwise.drop(attended, self._dropout(OUT))
        mid = self.linears.multiply(OUT, attended, dropped, residual=x)
        return mid, (qkv, attended, *statistics)

    def attend_backward(self, dmid: torch.Tensor, x: torch.Tensor, saved, *, need_dx: bool) -> torch.Tensor | None:
        layer, batch = self.layer, self.batch
        qkv, attended, *statistics = saved
        dropout = self._dropout(OUT)
        dattended, more = self.linears.multiply_backward(OUT, [dmid], elementwise.drop(attended, dropout), dropout)
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
        dropout, norm = self._dropout(QKV), layer.input_layernorm
        dropped = None
        if QKV in self.linears.adapters:
            dropped = elementwise.rms_norm(x, norm.weight, norm.variance_epsilon, dropout)[1]
        dnormed, more = self.linears.multiply_backward(QKV, gradients, dropped, dropout, need_dx=need_dx)
        if not need_dx:
            return None
        return elementwise.rms_norm_backward(dnormed, more, x, norm.weight, norm.variance_epsilon, dropout, dmid)

    def mlp(self, mid: torch.Tensor, y: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
        """Fills y [T, h], tile by tile; returns gate and up if they are kept."""
        gate_up = mid.new_empty(mid.shape[0], self.linears.width(GATE_UP)) if keep else None
        for start, stop in _tiles(mid.shape[0]):
            rows = slice(start, stop)
            tile, _ = self._gate_up(mid[rows], rows, out=gate_up[rows] if keep else None)
            product, dropped = elementwise.swiglu(tile, self._dropout_of_rows(DOWN, rows))
            self.linears.multiply(DOWN, product, dropped, rows, residual=mid[rows], out=y[rows])
        return gate_up

    def mlp_backward(self, dy: torch.Tensor, mid: torch.Tensor, gate_up: torch.Tensor | None) -> torch.Tensor:
        """The gradient of mid. Overwrites `gate_up`."""
        norm, dmid = self.layer.post_attention_layernorm, torch.empty_like(mid)
        for start, stop in _tiles(mid.shape[0]):
            rows = slice(start, stop)
            if gate_up is None:
                tile, dropped = self._gate_up(mid[rows], rows)
            else:
                tile = gate_up[rows]
                dropped = self._norm_of_mid(mid[rows], rows)[1] if GATE_UP in self.linears.adapters else None
            down, width = self._dropout_of_rows(DOWN, rows), self.linears.width(GATE_UP) // 2
            dproduct, more = self.linears.multiply_backward(DOWN, [dy[rows]], None, down)
            product = elementwise.swiglu_backward_(dproduct, more, tile, down)
            del dproduct, more
            if gate_up is None and DOWN in self.linears.adapters:
                self.linears.fill_low(DOWN, product, rows)
            self.linears.add_adapter_gradients(DOWN, [dy[rows]], product, rows)
            del product
            first = self._dropout_of_rows(GATE_UP, rows)
            halves = [tile[:, :width], tile[:, width:]]
            dnormed, more = self.linears.multiply_backward(GATE_UP, halves, dropped, first, rows)
            dmid[rows] = elementwise.rms_norm_backward(
                dnormed, more, mid[rows], norm.weight, norm.variance_epsilon, first, dy[rows]
            )
        return dmid

    def _gate_up(self, mid, rows: slice, out=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up, the dropped norm that their adapter reads)"""
        normed, dropped = self._norm_of_mid(mid, rows)
        return self.linears.multiply(GATE_UP, normed, dropped, rows, out=out), dropped

    def _norm_of_mid(self, mid, rows: slice):
        norm, dropout = self.layer.post_attention_layernorm, self._dropout_of_rows(GATE_UP, rows)
        return elementwise.rms_norm(mid, norm.weight, norm.variance_epsilon, dropout)

    def _dropout(self, group: int) -> Dropout | None:
        """Of all tokens of the batch."""
        p = self.linears.dropout_of(group) if self.layer.training else 0.0
        if not p:
            return None
        if self.batch.dropout_keys is None:
            raise ValueError("lora.dropout needs dropout_keys beside the batch: see fitune.model.dropout_keys")
        return Dropout(p, self.batch.dropout_keys, self.layer.self_attn.layer_idx * len(GROUPS) + group + 1)

    def _dropout_of_rows(self, group: int, rows: slice) -> Dropout | None:
        dropout = self._dropout(group)
        return dropout.rows(rows.start, rows.stop) if dropout else None

    def _heads(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """q, k, v as views [T, heads, head_dim]."""
        size = self.layer.self_attn.head_dim
        return [qkv[:, columns].unflatten(1, (-1, size)) for columns in self.linears.columns(QKV).values()]

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


def _tiles(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + MLP_TILE, tokens)) for start in range(0, tokens, MLP_TILE)]
