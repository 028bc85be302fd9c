"""A Llama decoder layer, trained itself or frozen with LoRA: forward and backward written out as one autograd function.

    n1  = norm(x)                 T tokens, h hidden, k of keys and values, i intermediate; [T, .] throughout
    q, k, v = n1 Wq', n1 Wk', n1 Wv'     W' stands for the trained weight, or for W + s B A: frozen, with an adapter
    o   = attention(rope(q), rope(k), v)        q has h channels too, unless config.json gives heads another size
    mid = x + o Wo'
    n2  = norm(mid)
    y   = mid + (silu(n2 Wgate') * n2 Wup') Wdown'

Mistral's layer is the same. Those of Qwen2 and some Llamas add a bias to products; Qwen3 norms each head of q and k
before it is rotated.

A kept layer saves x, q, k, v, o, mid, gate and up, (4 h + 2 k + 2 i) values a token, and s x A' of each adapter, r
values. A recomputed one saves x; and o, if attention is kept, which takes most of the time where examples are long.
What is cheap is computed again in all: norms, the activation, dropout. A frozen
weight has no gradient; NF4 weights are dequantised just before each product (`fitune.model.products`, or in e4m3
`fitune.model.fp8`). The MLP goes through `MLP_TILE` tokens at a time, so that its working memory does not grow with the
batch.

Parameters stay where transformers and PEFT put them, under their names, and FSDP gathers and frees them as before: this
module only replaces what is computed.
"""

import functools

import torch
from torch import nn

from fitune.model import attention, fp8
from fitune.model.host_inputs import HostInputs
from fitune.model.layer_pass import Batch, LayerPass
from fitune.model.linears import Linears, base_of


class DecoderLayer(nn.Module):
    """Put before transformers' class of a layer: the same submodules, computed as above.

    With a key-value cache, as in generation, it computes as ever.
    """

    keep = False
    "Whether what the backward pass needs is kept instead of recomputed."
    keep_attention = False
    "Whether attention's result is, where the rest is not."
    host_inputs: HostInputs | None = None
    "Where its input, and attention's result if kept, wait for the backward pass, if in host RAM."
    fp8 = False
    "Whether training multiplies weights in e4m3. Evaluation never does: the result is to be used without."
    trains_base = False
    "Whether weights, biases and norms are trained, and there is no adapter: method full."

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
        linears, host_inputs = self._linears(), self.host_inputs if torch.is_grad_enabled() else None
        return _Function.apply(hidden_states, self, batch, linears, host_inputs, *self._trained(linears))

    def train(self, mode: bool = True) -> "DecoderLayer":
        """Trainer asks for it in every pass; only a change goes through the layer's many modules."""
        return self if self.training == mode else super().train(mode)

    def _trained(self, linears: Linears) -> list[torch.Tensor] | tuple[torch.Tensor, ...]:
        """The parameters, as they are now: FSDP exchanges them."""
        if not self.trains_base:
            return linears.parameters()
        return [*linears.trained_parameters(), *(norm.weight for norm in self.norms())]

    def norms(self) -> list[nn.Module]:
        return [self.input_layernorm, self.post_attention_layernorm, *self.head_norms()]

    def head_norms(self) -> list[nn.Module]:
        """Of the heads of q and k, [] where there are none."""
        a = self.self_attn
        return [a.q_norm, a.k_norm] if hasattr(a, "q_norm") else []

    def linears(self) -> list[nn.Module]:
        """q, k, v, o, gate, up, down."""
        a, m = self.self_attn, self.mlp
        return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]

    def _linears(self) -> Linears:
        """What is known of them, found anew when they have changed."""
        modules, found = self.linears(), self.__dict__.get("found_linears")
        if found is None or not found.are(modules):
            found = self.__dict__["found_linears"] = Linears(modules)
        return found

    def bases(self) -> list[nn.Linear]:
        """The same without their adapters."""
        return [base_of(linear) for linear in self.linears()]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, layer: DecoderLayer, batch: Batch, linears: Linears, host_inputs: HostInputs | None, *parameters
    ):
        """x [rows, length, h] -> the same. `parameters` are the trained ones."""
        y, x = torch.empty_like(x), x.flatten(0, 1)
        host_inputs = host_inputs if any(ctx.needs_input_grad) else None  # else no backward pass asks for it
        waiting = host_inputs.offload([x]) if host_inputs else None
        work = LayerPass(layer, batch, linears, parameters, x)
        mid, (qkv, *result) = work.attend(x)
        kept = [qkv, *result] if layer.keep else result if layer.keep_attention else []
        if host_inputs:
            host_inputs.offload(kept, waiting)
        del qkv, result  # what is not kept, before the MLP takes its room; what leaves goes once it has left
        gate_up = work.mlp(mid, y.flatten(0, 1), keep=layer.keep)
        ctx.work_of = layer, batch, linears, host_inputs, parameters  # weights: FSDP brings them back where they were
        ctx.waiting, ctx.scales = waiting, work.linears.scales if layer.trains_base else None
        if host_inputs:
            host_inputs.release()
        else:
            ctx.save_for_backward(x, *kept, *((mid, gate_up, *work.lows()) if layer.keep else ()))
        return y

    @staticmethod
    def backward(ctx, dy):
        layer, batch, linears, host_inputs, parameters = ctx.work_of
        x, *kept = host_inputs.fetch(ctx.waiting) if host_inputs else ctx.saved_tensors
        gate_up = lows = None
        if layer.keep:
            if not layer.trains_base:
                *kept, lows = kept
            *attended, mid, gate_up = kept
        work = LayerPass(layer, batch, linears, parameters, x, lows, ctx.scales)
        if not layer.keep:
            mid, attended = work.attend(x, kept)
        dmid = work.mlp_backward(dy.flatten(0, 1).contiguous(), mid, gate_up)
        del kept, mid, gate_up
        dx = work.attend_backward(dmid, x, attended, need_dx=ctx.needs_input_grad[0])
        return dx if dx is None else dx.view_as(dy), None, None, None, None, *work.gradients()


def use_fp8_products(model: nn.Module) -> None:
    """Has a model's decoder layers train in fp8. Raises UsageError where sizes forbid it."""
    for layer in model.model.layers:
        for base in layer.bases():
            fp8.check_sizes(base)
        layer.fp8 = True


def use_written_out_layers(model: nn.Module, *, train_base: bool = False) -> None:
    """Makes each decoder layer of a model a `DecoderLayer`, which computes gradients of its own parameters if asked."""
    for layer in model.model.layers:
        layer.__class__ = _written_out(type(layer))
        layer.trains_base = train_base


@functools.cache
def _written_out(kind: type[nn.Module]) -> type[nn.Module]:
    """transformers' class of a layer with `DecoderLayer` before it."""
    return type(f"WrittenOut{kind.__name__}", (DecoderLayer, kind), {})
