"""The decoder layer's elementwise work, each a single pass over its tokens: RMSNorm, SwiGLU, RoPE, dropout, gradients.

On a GPU each function is one Triton kernel (`fitune.model.elementwise_triton`) that never compiles again for batches of
other lengths; elsewhere it is the formula below, which the kernels are tested against. T tokens, h hidden size, i
intermediate size.

Dropout keeps neither mask nor dropped copy: whether element (token, channel) is kept follows from the token's key, the
place in the model and the channel, so every pass finds the same mask again. See `fitune.model.dropout_keys`.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fitune.model.dropout import Dropout

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B1  # 2**32 / golden ratio: spreads neighbouring channels


def mix(x: torch.Tensor | int) -> torch.Tensor | int:
    """A bijection of 32-bit numbers (tensors in int64) whose every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & WORD
    return x ^ (x >> 16)


def factors(dropout: Dropout, channels: int) -> torch.Tensor:
    """[T, channels] float32: 0 for a dropped element, 1 / (1 - p) for a kept one."""
    keys = mix(dropout.keys.long() & WORD ^ dropout.place).unsqueeze(1)
    columns = torch.arange(channels, device=keys.device) * GOLDEN & WORD
    return (mix(keys ^ columns) >= dropout.threshold).float() * dropout.scale


def _kernels():
    from fitune.model import elementwise_triton

    return elementwise_triton


def drop(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """x [T, c] with dropout; x itself where there is none."""
    if dropout is None:
        return x
    if x.is_cuda:
        return _kernels().drop(x, dropout)
    return (wide(x) * factors(dropout, x.shape[1])).to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm, norm with dropout) of x [T, h]; the same tensor twice where there is none."""
    if x.is_cuda:
        return _kernels().rms_norm(x, weight, eps, dropout)
    normed = _before_weight(x, eps) * weight
    return normed, drop(normed, dropout)


def _before_weight(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of x that its weight multiplies, in x's dtype."""
    exact = wide(x)
    return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def dropped_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dropout: Dropout | None) -> torch.Tensor:
    """The second of `rms_norm` alone."""
    if x.is_cuda:
        return _kernels().dropped_norm(x, weight, eps, dropout)
    return rms_norm(x, weight, eps, dropout)[1]


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x [T, h] from that of the norm, plus `residual` where there is one, in `out` if it is given."""
    if x.is_cuda:
        return _kernels().rms_norm_backward(gradient, x, weight, eps, residual, out)
    exact = wide(x)
    inverse = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    g = wide(gradient) * wide(weight)
    inner = (g * exact).mean(-1, keepdim=True)
    result = inverse * g - exact * inverse.pow(3) * inner
    result = (result if residual is None else wide(residual) + result).to(x.dtype)
    return result if out is None else out.copy_(result)


def trained_rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`rms_norm_backward`, the gradient of weight: [h], in the dtype of sums)"""
    if x.is_cuda:
        return _kernels().trained_rms_norm_backward(gradient, x, weight, eps, residual, out)
    of_weight = (wide(gradient) * _before_weight(x, eps)).sum(0)
    return rms_norm_backward(gradient, x, weight, eps, residual, out), of_weight


def norm_heads(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """heads [T, n, d], each normed by itself; weight [d]."""
    return rms_norm(heads.reshape(-1, heads.shape[-1]), weight, eps, None)[0].view(heads.shape)


def swiglu(gate_up: torch.Tensor, dropout: Dropout | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(silu(gate) * up, the same with dropout) of gate_up [T, 2 i]."""
    if gate_up.is_cuda:
        return _kernels().swiglu(gate_up, dropout)
    gate, up = gate_up.chunk(2, -1)
    product = F.silu(gate) * up
    return product, drop(product, dropout)


def swiglu_backward_(gradient: torch.Tensor, gate_up: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Writes the gradient of gate_up [T, 2 i] over it; returns silu(gate) * up with dropout, [T, i], as `swiglu`.

    `gradient` is that of the product.
    """
    if gate_up.is_cuda:
        return _kernels().swiglu_backward_(gradient, gate_up, dropout)
    product = swiglu(gate_up, dropout)[1]
    gate, up = (wide(part) for part in gate_up.chunk(2, -1))
    sigmoid, d = torch.sigmoid(gate), wide(gradient)
    silu = gate * sigmoid
    gate_up.copy_(torch.cat([d * up * (sigmoid + silu * (1 - sigmoid)), d * silu], -1))
    return product


def rope_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates heads [T, n, d] by their tokens' angles (cos, sin [T, d], halves alike) in place."""
    if heads.is_cuda:
        _kernels().rope_(heads, cos, sin)
    else:
        heads.copy_(_rotated(heads, cos, sin))


def rope_from_places(
    parts: Sequence[torch.Tensor], places: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, *, back: bool
) -> torch.Tensor:
    """Query, key and value, [., heads, d] each, side by side: [T, all heads, d], query and key rotated.

    Token t of the result is read at `places` [T], or at t. It is rotated by the angles of the place it is read at, or
    `back`, as gradients are, by its own.
    """
    if parts[0].is_cuda:
        return _kernels().rope_from_places(parts, places, cos, sin, back=back)
    if places is not None:
        parts = [part.index_select(0, places) for part in parts]
        if not back:
            cos, sin = cos.index_select(0, places), sin.index_select(0, places)
    rotated = [_rotated(part, cos, -sin if back else sin) for part in parts[:2]]
    return torch.cat([*rotated, parts[2]], dim=1)


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, -1)
    half = heads.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    return torch.cat([first * c - second * s, second * c + first * s], -1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of sums."""
    return x.to(wide_dtype(x.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums: float32, but of float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
