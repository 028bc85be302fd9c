"""Both gradients that an adapter's B gives, by one reading of the outputs' gradient. Imported on GPUs alone.

Of y = a B^T, dB = dy^T a and da = dy B each read all of dy, and cuBLAS reads at the speed of memory already. Here a
program keeps some columns of dy and goes through tokens. Each writes its part of the sums in float32, and they are
added up in one order: equal runs give equal bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from fitune.model.grid import blocks_of
from fitune.model.launched import Launched
from fitune.model.low_rank_triton import borders

TOKENS, COLUMNS = 64, 512  # of dy, for one program at a time: the fastest of 21 shapes on an H200
RANKS = 16  # of a linear, at most: with 32 there is room for half as many columns, which gains nothing
PROGRAMS = 256  # about: two for each multiprocessor
WORTH = 2**26  # elements of dy of one or two linears: fewer are gone before Python has launched three kernels
SUMS = 1024  # numbers that one program adds up
SHARED_BYTES = 220 * 1024  # of a program's memory, for three parts of dy: Hopper and the large Blackwells have it


@Launched
@triton.jit(do_not_specialize=["tokens", "share"])
def _kernel(dy, dy_row, low, low_row, up, low_parts, up_parts, tokens, share, SECOND: tl.constexpr,
            THIRD: tl.constexpr, CHANNELS: tl.constexpr, RANK: tl.constexpr,
            TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
    """SECOND, THIRD: the columns where the second and third linear begin; no block of columns crosses them."""
    block, part = tl.program_id(0), tl.program_id(1)
    first = block * COLUMNS
    column, rank = first + tl.arange(0, COLUMNS), tl.arange(0, RANKS)[None, :]
    of_up, at_up = (column < CHANNELS)[:, None] & (rank < RANK), column[:, None] * RANK + rank
    weights = tl.load(up + at_up, mask=of_up, other=0.0)
    low += ((first >= SECOND).to(tl.int32) + (first >= THIRD).to(tl.int32)) * RANK
    total = tl.zeros((COLUMNS, RANKS), tl.float32)
    for start in tl.range(part * share, min((part + 1) * share, tokens), TOKENS, num_stages=3):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        inside = (token < tokens) & (rank < RANK)
        d = tl.load(dy + token * dy_row + column[None, :], mask=(token < tokens) & (column < CHANNELS)[None, :],
                    other=0.0)  # fmt: skip
        of_tokens = tl.load(low + token * low_row + rank, mask=inside, other=0.0)
        total = tl.dot(tl.trans(d), of_tokens, total, input_precision="ieee")
        product = tl.dot(d, weights, input_precision="ieee")
        tl.store(low_parts + (block.to(tl.int64) * tokens + token) * RANK + rank, product, mask=inside)
    tl.store(up_parts + part.to(tl.int64) * CHANNELS * RANK + at_up, total, mask=of_up)


@Launched
@triton.jit(do_not_specialize=["count", "parts"])
def _sum_kernel(values, out, count, parts, ADD: tl.constexpr, SUMS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)
    total = tl.zeros((SUMS,), tl.float32)
    source = at
    for _ in range(0, parts):
        total += tl.load(values + source, mask=at < count, other=0.0)
        source += count
    if ADD:
        total += tl.load(out + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=at < count)


@Launched
@triton.jit(do_not_specialize=["tokens"])
def _sum_low_kernel(values, out, scaling, tokens, SECOND: tl.constexpr, THIRD: tl.constexpr, BLOCKS: tl.constexpr,
                    RANK: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
    """A program for some tokens of one linear. SECOND, THIRD: the blocks of columns where those linears begin."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    linear, rank = tl.program_id(1), tl.arange(0, RANKS)[None, :]
    inside = (token < tokens) & (rank < RANK)
    first = tl.where(linear == 0, 0, tl.where(linear == 1, SECOND, THIRD))
    last = tl.where(linear == 0, SECOND, tl.where(linear == 1, THIRD, BLOCKS))
    total = tl.zeros((TOKENS, RANKS), tl.float32)
    at = (first * tokens + token) * RANK + rank
    for _ in range(first, last):
        total += tl.load(values + at, mask=inside, other=0.0)
        at += tokens * RANK
    tl.store(out + token * tl.num_programs(1) * RANK + linear * RANK + rank, total * scaling, mask=inside)


@cache
def has_room(device: torch.device) -> bool:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= SHARED_BYTES


def worth(dy: torch.Tensor, widths: tuple[int, ...], rank: int) -> bool:
    """Whether the kernel knows such numbers, ranks and linears on this GPU, and is the faster way.

    The other way launches two kernels for each linear, this one three in all.
    """
    if dy.element_size() != 2 or rank > RANKS or not has_room(dy.device):
        return False
    if len(widths) < 3 and dy.numel() < WORTH:
        return False
    return len(widths) <= 3 and not any(width % COLUMNS for width in widths[:-1])


def gradients(dy, low, up, widths: tuple[int, ...], scaling: float, *, out: torch.Tensor, add: bool) -> torch.Tensor:
    """Returns da s, [T, linears x r], of dy [T, all outputs]; out (+)= dB, [all outputs, r].

    low, a, [T, linears x r] and up, B, [all outputs, r] as for `low_rank_triton.fill`. `widths`: the outputs of each
    linear.
    """
    (tokens, channels), rank = dy.shape, up.shape[1]
    blocks = blocks_of(channels, COLUMNS)
    share = blocks_of(blocks_of(tokens, blocks_of(PROGRAMS, blocks)), TOKENS) * TOKENS
    parts = blocks_of(tokens, share)
    low_parts = torch.empty(blocks, tokens, rank, dtype=torch.float32, device=dy.device)
    up_parts = torch.empty(parts, channels, rank, dtype=torch.float32, device=dy.device)
    second, third = borders(widths)
    _kernel[(blocks, parts)](
        dy, dy.stride(0), low, low.stride(0), up, low_parts, up_parts, tokens, share, SECOND=second, THIRD=third,
        CHANNELS=channels, RANK=rank, TOKENS=TOKENS, COLUMNS=COLUMNS, RANKS=RANKS, num_warps=8,
    )  # fmt: skip
    gradient = dy.new_empty(tokens, len(widths) * rank)
    _sum_low_kernel[(blocks_of(tokens, 2 * TOKENS), len(widths))](
        low_parts, gradient, scaling, tokens, SECOND=blocks_of(second, COLUMNS), THIRD=blocks_of(third, COLUMNS),
        BLOCKS=blocks, RANK=rank, TOKENS=2 * TOKENS, RANKS=RANKS,
    )  # fmt: skip
    _sum_kernel[(blocks_of(out.numel(), SUMS),)](up_parts, out, out.numel(), parts, ADD=add, SUMS=SUMS)
    return gradient
