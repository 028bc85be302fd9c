"""Triton kernels of `fitune.model.elementwise`, which says what each computes. Imported on GPUs alone.

One program per token (and block of channels). The number of tokens is the grid, so no batch compiles anything anew;
sizes of the model are compile-time constants. Computing is in float32.
"""

import torch
import triton
import triton.language as tl

from fitune.model.dropout import Dropout
from fitune.model.grid import blocks_of, power_of_two
from fitune.model.launched import Launched

BLOCK = 2048  # channels of one program where a row needs no sum
ELEMENTS, PROGRAMS = 65536, 1024  # of one program that adds up over tokens, at least; of those, at most


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def factors(keys, token, columns, place, threshold, scale):
    key = tl.load(keys + token).to(tl.uint32, bitcast=True) ^ place.to(tl.uint32)
    number = mix(mix(key) ^ (columns.to(tl.uint32) * 0x9E3779B1))
    return tl.where(number >= threshold.to(tl.uint32), scale, 0.0)


@Launched
@triton.jit(do_not_specialize=["place", "threshold"])
def _drop_kernel(x, x_row, out, keys, place, threshold, scale, channels, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    value = tl.load(x + token * x_row + columns, mask=inside).to(tl.float32)
    value *= factors(keys, token, columns, place, threshold, scale)
    tl.store(out + token * channels + columns, value, mask=inside)


@Launched
@triton.jit(do_not_specialize=["place", "threshold"])
def _rms_norm_kernel(x, weight, normed, dropped, keys, place, threshold, scale, eps,
                     CHANNELS: tl.constexpr, NORM: tl.constexpr, DROP: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < CHANNELS
    row = token * CHANNELS + columns
    value = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / CHANNELS + eps)
    kind = normed.dtype.element_ty
    result = (value * inverse).to(kind).to(tl.float32) * tl.load(weight + columns, mask=inside).to(tl.float32)
    if NORM:
        tl.store(normed + row, result, mask=inside)
    if DROP:
        result = result.to(kind).to(tl.float32) * factors(keys, token, columns, place, threshold, scale)
        tl.store(dropped + row, result, mask=inside)


@triton.jit
def _through_norm(value, gradient, weight, eps, CHANNELS: tl.constexpr):
    """(the gradient of a row from that of its norm, the norm before its weight)"""
    g = gradient * weight
    inverse = tl.rsqrt(tl.sum(value * value) / CHANNELS + eps)
    inner = tl.sum(g * value) / CHANNELS
    return inverse * g - value * inverse * inverse * inverse * inner, value * inverse


@Launched
@triton.jit
def _rms_norm_backward_kernel(gradient, x, weight, residual, out, eps,
                              CHANNELS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < CHANNELS
    row = token * CHANNELS + columns
    value = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + row, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result, _ = _through_norm(value, g, w, eps, CHANNELS)
    if ADD:
        result += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, result, mask=inside)


@Launched
@triton.jit
def _trained_rms_norm_backward_kernel(gradient, x, weight, residual, out, sums, eps, tokens,
                                      CHANNELS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
                                      BLOCK: tl.constexpr):  # fmt: skip
    """The same of some tokens, one after the other, and the sum of theirs for the weight's gradient."""
    columns = tl.arange(0, BLOCK)
    inside = columns < CHANNELS
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(ROWS):
        token = tl.program_id(0).to(tl.int64) * ROWS + number
        row, here = token * CHANNELS + columns, inside & (token < tokens)
        value = tl.load(x + row, mask=here, other=0.0).to(tl.float32)
        g = tl.load(gradient + row, mask=here, other=0.0).to(tl.float32)
        result, normed = _through_norm(value, g, w, eps, CHANNELS)
        total += g * normed.to(x.dtype.element_ty).to(tl.float32)
        if ADD:
            result += tl.load(residual + row, mask=here, other=0.0).to(tl.float32)
        tl.store(out + row, result, mask=here)
    tl.store(sums + tl.program_id(0).to(tl.int64) * CHANNELS + columns, total, mask=inside)


@Launched
@triton.jit(do_not_specialize=["place", "threshold"])
def _swiglu_kernel(gate_up, product, dropped, keys, place, threshold, scale,
                   CHANNELS: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < CHANNELS
    gate_at = gate_up + token * 2 * CHANNELS + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
    kind = product.dtype.element_ty
    value = ((gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up).to(kind)
    row = token * CHANNELS + columns
    tl.store(product + row, value, mask=inside)
    if DROP:
        value = value.to(tl.float32) * factors(keys, token, columns, place, threshold, scale)
        tl.store(dropped + row, value, mask=inside)


@Launched
@triton.jit(do_not_specialize=["place", "threshold"])
def _swiglu_backward_kernel(gradient, gate_up, product, keys, place, threshold, scale,
                            CHANNELS: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < CHANNELS
    gate_at = gate_up + token * 2 * CHANNELS + columns
    row = token * CHANNELS + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(gradient + row, mask=inside, other=0.0).to(tl.float32)
    kind = product.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    value = (silu.to(kind).to(tl.float32) * up).to(kind).to(tl.float32)
    if DROP:
        value *= factors(keys, token, columns, place, threshold, scale)
    tl.store(product + row, value, mask=inside)
    tl.store(gate_at, d * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
    tl.store(gate_at + CHANNELS, d * silu, mask=inside)


@triton.jit
def _rotate(source, target, c, s, head, HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr):
    """Heads of one token, [block of heads, half of a head] at a time."""
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (head < HEADS) & (column < HALF)
    at = head * 2 * HALF + column
    first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + at, first * c - second * s, mask=inside)
    tl.store(target + at + HALF, second * c + first * s, mask=inside)


@triton.jit
def _angles(cos, sin, at, HALF: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    c = tl.load(cos + at + column, mask=column < HALF, other=0.0).to(tl.float32)
    return c, tl.load(sin + at + column, mask=column < HALF, other=0.0).to(tl.float32)


@Launched
@triton.jit
def _rope_kernel(heads, token_stride, cos, sin, angle_stride,
                 HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c, s = _angles(cos, sin, token * angle_stride, HALF, COLUMNS)
    row = heads + token * token_stride
    _rotate(row, row, c, s, head, HEADS, HALF, COLUMNS)


@Launched
@triton.jit
def _rope_from_places_kernel(query, query_row, key, key_row, value, value_row, places, out, cos, sin, angle_stride,
                             QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
                             PLACES: tl.constexpr, BACK: tl.constexpr,
                             BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A program for a block of one token's heads: first those of the query, then the key's, then the value's.

    Angles are those of the token read, or, turning back, of the one written.
    """
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token).to(tl.int64) if PLACES else token
    QUERY_BLOCKS: tl.constexpr = (QUERY_HEADS + BLOCK - 1) // BLOCK
    KEY_BLOCKS: tl.constexpr = (KEY_HEADS + BLOCK - 1) // BLOCK
    block = tl.program_id(1)
    head = tl.arange(0, BLOCK)[:, None]
    c, s = _angles(cos, sin, (token if BACK else place) * angle_stride, HALF, COLUMNS)
    s = -s if BACK else s
    target = out + token * (QUERY_HEADS + 2 * KEY_HEADS) * 2 * HALF
    if block < QUERY_BLOCKS:
        _rotate(query + place * query_row, target, c, s, head + block * BLOCK, QUERY_HEADS, HALF, COLUMNS)
    elif block < QUERY_BLOCKS + KEY_BLOCKS:
        head += (block - QUERY_BLOCKS) * BLOCK
        target += QUERY_HEADS * 2 * HALF
        _rotate(key + place * key_row, target, c, s, head, KEY_HEADS, HALF, COLUMNS)
    else:
        head += (block - QUERY_BLOCKS - KEY_BLOCKS) * BLOCK
        target += (QUERY_HEADS + KEY_HEADS) * 2 * HALF
        still = tl.zeros_like(s)
        _rotate(value + place * value_row, target, still + 1.0, still, head, KEY_HEADS, HALF, COLUMNS)


def dropping(dropout: Dropout | None, unused: torch.Tensor) -> tuple:
    """(keys, place, threshold, scale) for a kernel; without dropout it looks at none of them."""
    if dropout is None:
        return unused, 0, 0, 1.0
    return dropout.keys, dropout.place, dropout.threshold, dropout.scale


def _blocks(tokens: int, channels: int) -> tuple[int, int]:
    return tokens, blocks_of(channels, BLOCK)


def drop(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, channels = x.shape
    _drop_kernel[_blocks(tokens, channels)](x, x.stride(0), out, *dropping(dropout, x), channels, BLOCK=BLOCK)
    return out


def rms_norm(x, weight, eps: float, dropout: Dropout | None):
    normed = torch.empty_like(x)
    dropped = torch.empty_like(x) if dropout else normed
    _rms_norm(x, weight, normed, dropped, eps, dropout, norm=True)
    return normed, dropped


def dropped_norm(x, weight, eps: float, dropout: Dropout | None):
    dropped = torch.empty_like(x)
    _rms_norm(x, weight, dropped, dropped, eps, dropout, norm=dropout is None)
    return dropped


def _rms_norm(x, weight, normed, dropped, eps: float, dropout: Dropout | None, *, norm: bool) -> None:
    tokens, channels = x.shape
    _rms_norm_kernel[(tokens,)](
        x, weight, normed, dropped, *dropping(dropout, x), eps, CHANNELS=channels, NORM=norm, DROP=dropout is not None,
        BLOCK=power_of_two(channels), num_warps=8,
    )  # fmt: skip


def rms_norm_backward(gradient, x, weight, eps: float, residual, out=None):
    tokens, channels = x.shape
    out = torch.empty_like(x) if out is None else out
    _rms_norm_backward_kernel[(tokens,)](
        gradient, x, weight, x if residual is None else residual, out, eps, CHANNELS=channels,
        ADD=residual is not None, BLOCK=power_of_two(channels), num_warps=8,
    )  # fmt: skip
    return out


def trained_rms_norm_backward(gradient, x, weight, eps: float, residual, out=None):
    tokens, channels = x.shape
    out = torch.empty_like(x) if out is None else out
    rows = power_of_two(max(blocks_of(ELEMENTS, channels), blocks_of(tokens, PROGRAMS)))
    programs = blocks_of(tokens, rows)
    sums = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    _trained_rms_norm_backward_kernel[(programs,)](
        gradient, x, weight, x if residual is None else residual, out, sums, eps, tokens, CHANNELS=channels,
        ADD=residual is not None, ROWS=rows, BLOCK=power_of_two(channels), num_warps=8,
    )  # fmt: skip
    return out, sums.sum(0)


def swiglu(gate_up, dropout: Dropout | None):
    tokens, channels = gate_up.shape[0], gate_up.shape[1] // 2
    product = gate_up.new_empty(tokens, channels)
    dropped = torch.empty_like(product) if dropout else product
    _swiglu_kernel[_blocks(tokens, channels)](
        gate_up, product, dropped, *dropping(dropout, gate_up), CHANNELS=channels, DROP=dropout is not None,
        BLOCK=BLOCK,
    )  # fmt: skip
    return product, dropped


def swiglu_backward_(gradient, gate_up, dropout: Dropout | None):
    tokens, channels = gradient.shape
    product = torch.empty_like(gradient)
    _swiglu_backward_kernel[_blocks(tokens, channels)](
        gradient, gate_up, product, *dropping(dropout, gradient), CHANNELS=channels, DROP=dropout is not None,
        BLOCK=BLOCK,
    )  # fmt: skip
    return product


def rope_(heads, cos, sin) -> None:
    tokens, count, size = heads.shape
    _check_heads(heads)
    block = _block_of_heads(count)
    _rope_kernel[(tokens, blocks_of(count, block))](
        heads, heads.stride(0), cos, sin, cos.stride(0), HEADS=count, HALF=size // 2, BLOCK=block,
        COLUMNS=power_of_two(size // 2),
    )  # fmt: skip


def rope_from_places(parts, places, cos, sin, *, back: bool):
    for part in parts:
        _check_heads(part)
    (tokens, query_heads, size), key_heads = parts[0].shape, parts[1].shape[1]
    tokens = tokens if places is None else len(places)
    out = parts[0].new_empty(tokens, query_heads + 2 * key_heads, size)
    block = _block_of_heads(key_heads)
    blocks = blocks_of(query_heads, block) + 2 * blocks_of(key_heads, block)
    strided = (given for part in parts for given in (part, part.stride(0)))
    _rope_from_places_kernel[(tokens, blocks)](
        *strided, cos if places is None else places, out, cos, sin, cos.stride(0), QUERY_HEADS=query_heads,
        KEY_HEADS=key_heads, HALF=size // 2, PLACES=places is not None, BACK=back, BLOCK=block,
        COLUMNS=power_of_two(size // 2),
    )  # fmt: skip
    return out


def _check_heads(heads: torch.Tensor) -> None:
    if heads.stride(2) != 1 or heads.stride(1) != heads.shape[2]:
        raise ValueError(f"RoPE needs the heads of a token side by side, got strides {heads.stride()}")


def _block_of_heads(count: int) -> int:
    """How many of a token one program rotates."""
    return min(16, power_of_two(count))
