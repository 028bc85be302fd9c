"""Products of few ranks by one kernel: with the B of all linears of an input, or with A and dropout, what is added to
them included. Imported on GPUs alone.

cuBLAS takes one launch for each linear, copies an addend first, and reads and writes the output again to add to it.
"""

from functools import cache

import triton
import triton.language as tl

from fitune.model.dropout import Dropout
from fitune.model.elementwise_triton import dropping, factors
from fitune.model.grid import blocks_of, power_of_two
from fitune.model.launched import Launched

TOKENS, COLUMNS, RANKS = 64, 128, 64  # of one program at a time, at most


@Launched
@triton.jit(do_not_specialize=["place", "threshold"])
def _kernel(out, out_row, low, low_row, up, up_row, up_column, residual, residual_row, keys, place, threshold, scale,
            tokens, SECOND: tl.constexpr, THIRD: tl.constexpr, CHANNELS: tl.constexpr, RANK: tl.constexpr,
            ADD: tl.constexpr, RESIDUAL: tl.constexpr, DROP: tl.constexpr,
            TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
    """SECOND, THIRD: the columns where the second and third linear begin; no block of columns crosses them."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < CHANNELS)
    ranks = low + token * low_row + ((first >= SECOND).to(tl.int32) + (first >= THIRD).to(tl.int32)) * RANK
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, RANK, RANKS):
        rank = start + tl.arange(0, RANKS)
        of_tokens = tl.load(ranks + rank[None, :], mask=(token < tokens) & (rank < RANK)[None, :], other=0.0)
        at = up + column * up_row + rank[:, None] * up_column
        of_columns = tl.load(at, mask=(column < CHANNELS) & (rank < RANK)[:, None], other=0.0)
        total = tl.dot(of_tokens, of_columns, total, input_precision="ieee")
    target = out + token * out_row + column
    if DROP:
        total *= factors(keys, tl.minimum(token, tokens - 1), column, place, threshold, scale)
    if RESIDUAL:
        total += tl.load(residual + token * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total, mask=inside)


def can_fill(widths: tuple[int, ...]) -> bool:
    """Whether the kernel knows linears of so many outputs."""
    return len(widths) <= 3 and _columns(widths) >= 16


def fill(out, low, up, widths: tuple[int, ...], *, residual=None, add: bool, dropout: Dropout | None = None) -> None:
    """out (+)= low up^T (+ residual): out, residual [T, all outputs], low [T, linears x r], up [all outputs, r].

    `widths`: the outputs of each linear; each has r columns of `low`. `dropout` is that of the product.
    """
    (tokens, channels), rank = out.shape, up.shape[1]
    columns = _columns(widths)
    second, third = borders(widths)
    addend = (out, 0) if residual is None else (residual, residual.stride(0))
    _kernel[(blocks_of(tokens, TOKENS), blocks_of(channels, columns))](
        out, out.stride(0), low, low.stride(0), up, *up.stride(), *addend, *dropping(dropout, out), tokens,
        SECOND=second, THIRD=third, CHANNELS=channels, RANK=rank, ADD=add, RESIDUAL=residual is not None,
        DROP=dropout is not None, TOKENS=TOKENS, COLUMNS=columns,
        RANKS=min(RANKS, max(16, power_of_two(rank))),
    )  # fmt: skip


def borders(widths: tuple[int, ...]) -> tuple[int, int]:
    """The columns where the second and third linear begin; behind the last column where there is none."""
    return widths[0], sum(widths[:2])


@cache
def _columns(widths: tuple[int, ...]) -> int:
    """The largest power of two that divides where each linear but the first begins."""
    columns = COLUMNS
    while any(width % columns for width in widths[:-1]):
        columns //= 2
    return columns
