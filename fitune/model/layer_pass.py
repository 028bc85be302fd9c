"""The attention half and the MLP half of a decoder layer, each forward and backward.

`fitune.model.layer` has the formulas, what is kept, and the names of sizes: T tokens, h hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fitune.config.tiles import MLP_TILE
from fitune.model import attention, elementwise, fp8, products
from fitune.model.dropout import Dropout
from fitune.model.linears import ALL, DOWN, GATE_UP, GROUPS, OUT, QKV, Linears, part
from fitune.model.lora_linears import LoraLinears
from fitune.model.trained_linears import Scales, TrainedLinears


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

    `lows`, each adapter's s x A^T (`LoraLinears.lows`), come from the forward pass if the layer is a kept one; without
    them they are computed again. `scales` (`TrainedLinears.scales`) come from the forward pass of every layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        batch: Batch,
        linears: Linears,
        parameters: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        lows: torch.Tensor | None = None,
        scales: Scales | None = None,
    ):
        self.layer, self.batch = layer, batch
        in_fp8 = layer.fp8 and layer.training
        if layer.trains_base:
            self.linears = TrainedLinears(linears, in_fp8=in_fp8, scales=scales)
        else:
            self.linears = LoraLinears(linears, parameters, x, fp8 if in_fp8 else products, lows)
        self.of_norms: dict[nn.Module, torch.Tensor] = {}
        "The gradients of trained norms, in the dtype of sums."
        self.key_heads = linears.bases[1].out_features // layer.self_attn.head_dim
        self.dropouts = [self._dropout(group) for group in GROUPS]
        "By shared input, of all tokens of the batch; None where nothing is dropped."

    def attend(self, x: torch.Tensor, result: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, tuple]:
        """(mid, what the backward pass needs beside x: qkv and attention's result) of the attention half.

        Attention's `result` is not computed again if it is given.
        """
        dropout, norm = self.dropouts[QKV], self.layer.input_layernorm
        normed, dropped = elementwise.rms_norm(x, norm.weight, norm.variance_epsilon, dropout)
        qkv = self.linears.multiply(QKV, normed, dropped)
        if not result:
            heads = self._heads_for_attention(qkv, rotated=False)
            attended, statistics = attention.forward(heads, self.key_heads, *self._examples)
            result = attended.reshape(x.shape[0], -1), *statistics
            del heads
        elif self._rotates_in_place(qkv):
            self._heads_for_attention(qkv, rotated=False)  # as the backward pass expects
        attended = result[0]
        dropped = elementwise.drop(attended, self.dropouts[OUT])
        mid = self.linears.multiply(OUT, attended, dropped, residual=x)
        return mid, (qkv, *result)

    def attend_backward(self, dmid: torch.Tensor, x: torch.Tensor, saved, *, need_dx: bool) -> torch.Tensor | None:
        """The gradient of x, if it is needed: by a trained norm, too."""
        qkv, attended, *statistics = saved
        need_dx = need_dx or self.layer.trains_base
        dropout = self.dropouts[OUT]
        dattended = self.linears.multiply_backward(OUT, dmid, elementwise.drop(attended, dropout), dropout)
        heads = self._heads_for_attention(qkv, rotated=True)
        by_head = (x.unflatten(1, (-1, heads.shape[2])) for x in (dattended, attended))
        gradients, places = attention.backward(*by_head, heads, self.key_heads, statistics, *self._examples)
        del dattended, heads
        dheads = elementwise.rope_from_places(gradients, places, self.batch.cos, self.batch.sin, back=True)
        del gradients
        dqkv = self._head_norms_backward(dheads, qkv).flatten(1)
        dropout, norm = self.dropouts[QKV], self.layer.input_layernorm
        dropped = None
        if self.linears.wants_input(QKV):
            dropped = elementwise.dropped_norm(x, norm.weight, norm.variance_epsilon, dropout)
        dnormed = self.linears.multiply_backward(QKV, dqkv, dropped, dropout, need_dx=need_dx)
        if not need_dx:
            return None
        return self._norm_backward(norm, dnormed, x, dmid)

    def mlp(self, mid: torch.Tensor, y: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
        """Fills y [T, h], tile by tile; returns gate and up if they are kept."""
        gate_up = mid.new_empty(mid.shape[0], self.linears.linears.width(GATE_UP)) if keep else None
        for rows in _tiles(mid.shape[0]):
            of_tile = part(mid, rows)
            tile, _ = self._gate_up(of_tile, rows, out=part(gate_up, rows) if keep else None)
            product, dropped = elementwise.swiglu(tile, self._dropout_of_rows(DOWN, rows))
            self.linears.multiply(DOWN, product, dropped, rows, residual=of_tile, out=part(y, rows))
            del tile, product, dropped  # before the next tile's are there
        return gate_up

    def mlp_backward(self, dy: torch.Tensor, mid: torch.Tensor, gate_up: torch.Tensor | None) -> torch.Tensor:
        """The gradient of mid. Overwrites `gate_up`."""
        norm, dmid = self.layer.post_attention_layernorm, torch.empty_like(mid)
        for rows in _tiles(mid.shape[0]):
            of_tile, dy_of_tile = part(mid, rows), part(dy, rows)
            if gate_up is None:
                tile, dropped = self._gate_up(of_tile, rows)
            else:
                tile = part(gate_up, rows)
                dropped = self._dropped_norm_of_mid(of_tile, rows)
            down = self._dropout_of_rows(DOWN, rows)
            low = self.linears.low_gradient(DOWN, dy_of_tile)
            dproduct = self.linears.multiply_backward(DOWN, dy_of_tile, None, down, rows, low=low)
            product = elementwise.swiglu_backward_(dproduct, tile, down)
            del dproduct
            if gate_up is None:
                self.linears.fill_low(DOWN, product, rows)
            self.linears.add_gradients(DOWN, dy_of_tile, product, rows, low)
            del product
            first = self._dropout_of_rows(GATE_UP, rows)
            dnormed = self.linears.multiply_backward(GATE_UP, tile, dropped, first, rows)
            self._norm_backward(norm, dnormed, of_tile, dy_of_tile, out=part(dmid, rows))
            del tile, dropped, dnormed
        if self.layer.trains_base:
            self.linears.round_gradients()  # attention's half needs the room
        return dmid

    def lows(self) -> list[torch.Tensor]:
        """What a kept layer saves of its adapters."""
        return [] if self.layer.trains_base else [self.linears.lows]

    def gradients(self) -> list[torch.Tensor | None]:
        """Of the layer's trained parameters, in their order."""
        norms = self.layer.norms() if self.layer.trains_base else []
        return [*self.linears.gradients(), *(self.of_norms[norm].to(norm.weight.dtype) for norm in norms)]

    def _norm_backward(self, norm: nn.Module, gradient, x, residual=None, out=None) -> torch.Tensor:
        """The gradient of x [T, h], plus `residual`, from that of its norm; a trained norm's own too."""
        inputs = gradient, x, norm.weight, norm.variance_epsilon, residual, out
        if not self.layer.trains_base:
            return elementwise.rms_norm_backward(*inputs)
        dx, of_weight = elementwise.trained_rms_norm_backward(*inputs)
        earlier = self.of_norms.get(norm)
        self.of_norms[norm] = of_weight if earlier is None else earlier + of_weight
        return dx

    def _gate_up(self, mid, rows: slice, out=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up, the dropped norm that their adapter reads)"""
        norm, dropout = self.layer.post_attention_layernorm, self._dropout_of_rows(GATE_UP, rows)
        normed, dropped = elementwise.rms_norm(mid, norm.weight, norm.variance_epsilon, dropout)
        return self.linears.multiply(GATE_UP, normed, dropped, rows, out=out), dropped

    def _dropped_norm_of_mid(self, mid, rows: slice) -> torch.Tensor | None:
        if not self.linears.wants_input(GATE_UP):
            return None
        norm, dropout = self.layer.post_attention_layernorm, self._dropout_of_rows(GATE_UP, rows)
        return elementwise.dropped_norm(mid, norm.weight, norm.variance_epsilon, dropout)

    def _dropout(self, group: int) -> Dropout | None:
        p = self.linears.linears.dropouts.get(group)
        if not (p and self.layer.training):
            return None
        if self.batch.dropout_keys is None:
            raise ValueError("lora.dropout needs dropout_keys beside the batch: see fitune.model.dropout_keys")
        return Dropout(p, self.batch.dropout_keys, self.layer.self_attn.layer_idx * len(GROUPS) + group + 1)

    def _dropout_of_rows(self, group: int, rows: slice) -> Dropout | None:
        dropout = self.dropouts[group]
        return dropout and dropout.rows(rows)

    @property
    def _examples(self) -> tuple:
        return self.batch.bounds, self.batch.longest, self.layer.self_attn.scaling

    def _heads_for_attention(self, qkv: torch.Tensor, *, rotated: bool) -> torch.Tensor:
        """Those of q, k and v, [T, all heads, head_dim], q and k normed, where heads have norms, and rotated.

        They are rotated in place, once, but for two cases: norms, whose gradients need qkv as the products gave it, and
        examples that attention takes as rows with pads, which are written here. Then qkv stays as it is, and this is
        computed again in the backward pass.
        """
        heads = qkv.unflatten(1, (-1, self.layer.self_attn.head_dim))
        if rotated and self._rotates_in_place(qkv):
            return heads
        norms = self.layer.head_norms()
        if norms:
            query, key, value = attention.apart(heads, self.key_heads)
            normed = (
                elementwise.norm_heads(part, norm.weight, norm.variance_epsilon)
                for part, norm in zip((query, key), norms, strict=True)
            )
            heads = torch.cat([*normed, value], dim=1)
        rows = attention.rows_with_pads(heads, self.batch.bounds, self.batch.longest)
        if rows is not None:
            parts = attention.apart(heads, self.key_heads)
            return elementwise.rope_from_places(parts, rows.sources, self.batch.cos, self.batch.sin, back=False)
        elementwise.rope_(heads[:, : -self.key_heads], self.batch.cos, self.batch.sin)
        return heads

    def _rotates_in_place(self, qkv: torch.Tensor) -> bool:
        return not self.layer.head_norms() and attention.rows_with_pads(qkv, *self._examples[:2]) is None

    def _head_norms_backward(self, gradients: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """The gradients of the heads as the products gave them, from those of the normed ones."""
        norms = self.layer.head_norms()
        if not norms:
            return gradients
        query, key, value = attention.apart(gradients, self.key_heads)
        heads = attention.apart(qkv.view_as(gradients), self.key_heads)
        before = []
        for gradient, head, norm in zip((query, key), heads, norms, strict=False):  # v has none
            by_head = (x.reshape(-1, x.shape[-1]) for x in (gradient, head))
            before.append(self._norm_backward(norm, *by_head).view(head.shape))
        return torch.cat([*before, value], dim=1)


def _tiles(tokens: int) -> list[slice]:
    if tokens <= MLP_TILE:
        return [ALL]
    return [slice(start, min(start + MLP_TILE, tokens)) for start in range(0, tokens, MLP_TILE)]
