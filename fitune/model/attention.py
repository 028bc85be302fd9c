"""Attention over packed rows: each example attends to itself alone.

On a GPU by the FlashAttention kernel that PyTorch brings, or by cuDNN's where examples are long and about of one
length; on the CPU one example after the other. All demand the same of a batch. `sdpa` knows nothing of packing: it
computes all pairs of a row's tokens, with a mask of that size, and throws those between two examples away.
"""

import inspect
import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from fitune.config.attention_kernels import CUDNN_CAPABILITIES, CUDNN_FROM
from fitune.model.compute_capability import compute_capability

PACKED_ATTENTION = "fitune_packed"
"""Its name as a transformers `attn_implementation`. No mask comes with it: to make one, or none, transformers asks the
GPU in every pass whether the row is packed, and the GPU stands still until Python has the answer."""
PADDED_ATTENTION = "fitune_padded"
"""The same for answers, whose prompts may be padded: with a mask."""
CUDNN_STEP = 256
"""Lengths are padded to a multiple of so many tokens: cuDNN plans each new length for about 0.1 s."""
CUDNN_PADS = 1.12
"""Tokens with pads to tokens, at most: the work grows with its square, and rows with pads are copied."""
# torch 2.11 lets several query heads share a key and value head without being asked
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Query [1, heads, T, head_dim], key and value with fewer heads if they are shared -> ([1, T, heads, head_dim], -).

    Example n of the row is tokens [cu_seq_lens_q[n], cu_seq_lens_q[n + 1]), at most `max_length_q` of them, as TRL's
    collator describes a packed row. Rows that are not packed, as in generation, go to sdpa; `attention_mask`
    [rows, keys] says which of their keys are no padding. Only these may be longer than a `sliding_window`:
    `fitune.config.base_model` refuses to train on such rows.
    """
    if cu_seq_lens_q is None:
        mask = _visible(query.shape[2], key.shape[2], sliding_window, attention_mask, query.device)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        raise ValueError("a packed row has no padding, but an attention mask came with it")
    check_bounds(cu_seq_lens_q, max_length_q, query.device)
    rows = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # x[0] would have zeros filled in backward
    return _attend(*rows, cu_seq_lens_q, max_length_q, scaling).unsqueeze(0), None


def _visible(
    queries: int, keys: int, window: int | None, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """[rows or 1, 1, queries, keys]: which keys each query sees, of the last `window`. None where it is all before it.

    The queries are the last ones of the keys. Padding sees itself, as a row of no keys has no attention.
    """
    if attention_mask is None and (window is None or keys <= window):
        return None
    ahead = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = (ahead >= 0)[None, None]
    if window is not None:
        visible = visible & (ahead < window)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :] | (ahead == 0)
    return visible


def check_bounds(bounds: torch.Tensor, longest: int | None, device: torch.device) -> None:
    """Raises ValueError for what the GPU's kernel would not take, on every device."""
    if not isinstance(longest, int):
        raise ValueError(f"max_length_q {longest}: a packed row comes with the length of its longest example")
    if bounds.dtype != torch.int32 or bounds.device != device:
        raise ValueError(f"bounds of packed examples are int32 on {device}, not {bounds.dtype} on {bounds.device}")


def bounds_of_rows(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """int32 [rows + 1]: the bounds of rows that are not packed, one example each, as of one packed row."""
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)


def _attend(query, key, value, bounds, longest, scaling):
    """[T, heads, head_dim] of packed examples, for autograd."""
    kernel = kernel_of(query, bounds, longest)
    if kernel == "examples":
        return _by_example(query, key, value, bounds, longest, scaling)
    if kernel == "cudnn":
        rows = _rows_of(query, bounds, longest)
        inputs = (rows.of(x) for x in (query, key, value))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return rows.examples(
                F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scaling, enable_gqa=True)
            )
    options = {"scale": scaling, "window_size": (-1, 0)} | GROUPED  # tokens to the left, all; to the right, none
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)


def _by_example(query, key, value, bounds, longest, scaling):
    """[T, heads, head_dim], one example after the other, on any device."""
    parts = []
    for start, stop in pairwise(bounds.tolist()):
        rows = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*rows, is_causal=True, scale=scaling, enable_gqa=True))
    return torch.cat(parts, dim=1).transpose(0, 1)


def forward(
    heads: torch.Tensor, key_heads: int, bounds: torch.Tensor, longest: int, scaling: float
) -> tuple[torch.Tensor, tuple]:
    """([T, query heads, head_dim], what `backward` needs beside it) of packed examples, without autograd.

    `heads` [T, query heads + 2 key_heads, head_dim]: those of query, key and value side by side. Key and value may have
    fewer of them, each shared by neighbouring query heads. Where there are `rows_with_pads`, theirs may be given.
    """
    query, key, value = apart(heads, key_heads)
    kernel = kernel_of(query, bounds, longest)
    if kernel == "examples":
        return _by_example(query, key, value, bounds, longest, scaling), ()
    if kernel == "cudnn":
        rows = _rows_of(query, bounds, longest)
        output, log_sums, _, _, _, _, *random_state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *apart(rows.of(heads), key_heads, 1), None, True, 0.0, True, False, scale=scaling
        )
        return rows.examples(output), (log_sums, *random_state)
    output, log_sums, *random_state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
    )
    return output, (log_sums, *random_state)


def backward(
    gradient, output, heads, key_heads: int, statistics, bounds, longest: int, scaling: float
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """(the gradients of query, key and value, each [places, heads, head_dim], the tokens' places in them).

    No places: each token stands at its own. `gradient` is that of `output`, the others are as in `forward`.
    """
    query, key, value = apart(heads, key_heads)
    kernel = kernel_of(query, bounds, longest)
    if kernel == "examples":
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (query, key, value)]
            attended = _by_example(*inputs, bounds, longest, scaling)
            return list(torch.autograd.grad(attended, inputs, gradient)), None
    log_sums, *random_state = statistics
    if kernel == "cudnn":
        rows = _rows_of(query, bounds, longest)
        length = rows.shape[1]
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            rows.of_gradient(gradient), *apart(rows.of(heads), key_heads, 1), rows.of(output), log_sums, *random_state,
            None, None, None, length, length, 0.0, True, scale=scaling,
        )  # fmt: skip
        return [x.transpose(1, 2).flatten(0, 1) for x in gradients], rows.places
    gradients = torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, log_sums, bounds, bounds, longest, longest, 0.0, True, *random_state,
        scale=scaling,
    )  # fmt: skip
    return list(gradients), None


def apart(heads: torch.Tensor, key_heads: int, dim: int = -2) -> tuple[torch.Tensor, ...]:
    """Query, key and value, whose heads lie side by side along `dim`."""
    return heads.split([heads.shape[dim] - 2 * key_heads, key_heads, key_heads], dim)


def kernel_of(query: torch.Tensor, bounds: torch.Tensor, longest: int) -> str:
    """What computes these examples, known without asking the GPU: `cudnn`, `flash`, or one after the other, `examples`.

    cuDNN's kernel computes long examples of about one length. It is about twice as fast as FlashAttention on the GPUs
    that PyTorch itself prefers it on. It is given rows of one length: its own way for packed examples plans anew in
    every call, for about 40 ms.
    """
    capability = compute_capability(query.device)
    if capability is None:
        return "examples"
    tokens, examples = query.shape[0], len(bounds) - 1
    few_pads = examples * _padded(longest) <= CUDNN_PADS * tokens
    return "cudnn" if capability in CUDNN_CAPABILITIES and longest >= CUDNN_FROM and few_pads else "flash"


def _padded(length: int) -> int:
    return -(-length // CUDNN_STEP) * CUDNN_STEP


class Rows:
    """Packed examples as rows of one length, and back.

    Pads stand on the right, where no token sees them: causal attention of the others is what it was, whatever the pads
    hold, and pads whose output's gradient is zero give none to others.
    """

    def __init__(self, tokens: int, bounds: torch.Tensor, longest: int):
        self.shape = (len(bounds) - 1, _padded(longest))
        pads = math.prod(self.shape) - tokens
        self.full = not pads
        "The rows are the tokens."
        self.places: torch.Tensor | None = None
        "Of the tokens among the rows' places, where these are not the same."
        self.sources: torch.Tensor | None = None
        "The token at each place, any at a pad."
        if pads:
            starts, places = bounds[:-1, None], torch.arange(self.shape[1], device=bounds.device)
            is_token = places < bounds[1:, None] - starts
            self.pads = is_token.byte().flatten().argsort(stable=True)[:pads]
            self.sources = (starts + places).clamp(max=tokens - 1).flatten()
            numbers = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
            example = torch.searchsorted(bounds, numbers, right=True) - 1
            self.places = example * self.shape[1] + numbers - bounds[example]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, head_dim] -> [examples, heads, padded length, head_dim]; the pads hold any token's values.

        A view where there are none, and of what is already read from `sources`.
        """
        return self._split(x if len(x) == math.prod(self.shape) else x.index_select(0, self.sources))

    def of_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """The same with zeros in the pads."""
        return self.of(x) if self.full else self._split(x.index_select(0, self.sources).index_fill_(0, self.pads, 0))

    def examples(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `of`, contiguous."""
        tokens = rows.transpose(1, 2).flatten(0, 1)
        return tokens.contiguous() if self.full else tokens.index_select(0, self.places)

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, self.shape).transpose(1, 2)


def rows_with_pads(heads: torch.Tensor, bounds: torch.Tensor, longest: int) -> Rows | None:
    """What attention makes of these tokens' heads [T, ., .]; None where it takes them as they are."""
    if kernel_of(heads, bounds, longest) != "cudnn":
        return None
    rows = _rows_of(heads, bounds, longest)
    return None if rows.full else rows


def _rows_of(query: torch.Tensor, bounds: torch.Tensor, longest: int) -> Rows:
    """Made once for all layers of a pass, which share `bounds`."""
    if not hasattr(bounds, "fitune_rows"):
        bounds.fitune_rows = Rows(len(query), bounds, longest)
    return bounds.fitune_rows


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(PADDED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PADDED_ATTENTION, flash_attention_mask)
