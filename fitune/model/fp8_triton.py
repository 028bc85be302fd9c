"""Triton kernels of `fitune.model.fp8_rounding`, which says what each computes. Imported on GPUs alone.

Numbers of the model are compile-time constants, the number of tokens is the grid: no batch compiles anything anew.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from fitune.model.e4m3 import LARGEST, SMALLEST
from fitune.model.grid import blocks_of, power_of_two
from fitune.model.launched import Launched

AT_ONCE = 32768  # channels of a row that a program holds, and so reads once
CHANNELS = 8192  # of a wider row, read at a time
ROWS, COLUMNS = 128, 64  # of a weight, for one program: the fastest of 24 shapes on an H200, in both directions
MAXIMA_TILES, MAXIMA_TOKENS, MAXIMA_COLUMNS = 16, 64, 64  # of x, for one program: the fastest of 65 on an H200
SIDE = 128  # of a square of bytes, for one program: whole sectors of memory in both directions

_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)


@triton.jit
def _read(x, x_row, factors, token, inside, column, CHANNELS: tl.constexpr, WITH_FACTORS: tl.constexpr):
    """(channels of some rows in float32, those beyond the rows 0; which are within)"""
    inside = inside & (column < CHANNELS)[None, :]
    part = tl.load(x + token * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if WITH_FACTORS:
        part *= tl.load(factors + column, mask=column < CHANNELS, other=0.0)[None, :]
    return part, inside


@Launched
@triton.jit
def _quantise_rows_kernel(x, x_row, factors, values, scales, tokens, CHANNELS: tl.constexpr,
                          WITH_FACTORS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Some tokens, which share the reading of factors: the largest of a row's channels, then all of them rounded."""
    number = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token, here = number.to(tl.int64)[:, None], (number < tokens)[:, None]
    column = tl.arange(0, BLOCK)
    part, inside = _read(x, x_row, factors, token, here, column, CHANNELS, WITH_FACTORS)
    most = tl.abs(part)
    for start in range(BLOCK, CHANNELS, BLOCK):
        further, _ = _read(x, x_row, factors, token, here, start + column, CHANNELS, WITH_FACTORS)
        most = tl.maximum(most, tl.abs(further))
    scale = tl.div_rn(tl.maximum(tl.max(most, axis=1), _SMALLEST), _LARGEST)
    inverse = tl.div_rn(1.0, scale)[:, None]
    tl.store(scales + number, scale, mask=number < tokens)
    target = values + token * CHANNELS + column[None, :]
    tl.store(target, (part * inverse).to(values.dtype.element_ty), mask=inside)
    for start in range(BLOCK, CHANNELS, BLOCK):  # from the cache
        part, inside = _read(x, x_row, factors, token, here, start + column, CHANNELS, WITH_FACTORS)
        tl.store(target + start, (part * inverse).to(values.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _round_nf4_kernel(packed, absmax, absmax_code, nested, offset, code, scales, out, out_row, out_column, rows,
                      BLOCKS: tl.constexpr, PER_NESTED: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """ROWS x COLUMNS weights; BLOCKS of 64 weights, which share an absmax, make a row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)
    inside = (row < rows)[:, None] & (block < BLOCKS)[None, :]
    number = row[:, None].to(tl.int64) * BLOCKS + block[None, :]
    largest = tl.load(absmax_code + tl.load(absmax + number, mask=inside, other=0).to(tl.int32))
    largest = largest * tl.load(nested + number // PER_NESTED, mask=inside, other=0.0) + tl.load(offset)
    at = packed + number[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    pair = tl.load(at, mask=inside[:, :, None], other=0).to(tl.int32)
    high, low = tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))  # the high half comes first
    weights = tl.reshape(tl.join(high, low), (ROWS, COLUMNS // 64, 64)) * largest[:, :, None]
    inverse = tl.div_rn(1.0, tl.load(scales + row, mask=row < rows, other=1.0))
    weights = tl.reshape(weights, (ROWS, COLUMNS)) * inverse[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < BLOCKS * 64)[None, :]
    target = out + row[:, None].to(tl.int64) * out_row + column[None, :].to(tl.int64) * out_column
    tl.store(target, weights.to(out.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _round_matrix_kernel(matrix, matrix_row, scales, out, out_row, out_column, rows, columns,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """The same from a weight that is not packed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    source = matrix + row[:, None].to(tl.int64) * matrix_row + column[None, :]
    weights = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(scales + row, mask=row < rows, other=1.0))
    target = out + row[:, None].to(tl.int64) * out_row + column[None, :].to(tl.int64) * out_column
    tl.store(target, (weights * inverse[:, None]).to(out.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _column_maxima_kernel(x, x_row, factors, most, tokens, channels,
                          TILES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """The largest of some channels in TILES times TOKENS tokens, after the tokens' factors; `most` began as zeros."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    largest = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for tile in tl.static_range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        inside = (token < tokens)[:, None] & (column < channels)[None, :]
        part = tl.load(x + token[:, None].to(tl.int64) * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        part *= tl.load(factors + token, mask=token < tokens, other=0.0)[:, None]
        largest = tl.maximum(largest, tl.abs(part))
    tl.atomic_max(most + column, tl.max(largest, axis=0), mask=column < channels)


@Launched
@triton.jit
def _round_columns_kernel(x, x_row, factors, most, scales, out, out_row, tokens, channels,
                          TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """TOKENS x COLUMNS numbers of x, turned; the first tokens' programs also write their channels' scales."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (column < channels)[None, :]
    part = tl.load(x + token[:, None].to(tl.int64) * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    part *= tl.load(factors + token, mask=token < tokens, other=0.0)[:, None]
    largest = tl.load(most + column, mask=column < channels, other=1.0)
    scale = tl.div_rn(tl.maximum(largest, _SMALLEST), _LARGEST)
    if tl.program_id(0) == 0:
        tl.store(scales + column, scale, mask=column < channels)
    part *= tl.div_rn(1.0, scale)[None, :]
    target = out + column[None, :].to(tl.int64) * out_row + token[:, None]
    tl.store(target, part.to(out.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _transpose_kernel(values, out, out_column, rows, columns, SIDE: tl.constexpr):
    """A square of bytes: values [rows, columns], out [columns, rows] with rows of out_column bytes."""
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    square = tl.load(values + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0)
    target = out + column[:, None].to(tl.int64) * out_column + row[None, :]
    tl.store(target, tl.trans(square), mask=tl.trans(inside))


def quantise_rows(x: torch.Tensor, factors: torch.Tensor | None, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Fills values (e4m3, like x) and scales."""
    tokens, channels = x.shape
    rows, block, warps = _rows_at_once(channels, with_factors=factors is not None)
    _quantise_rows_kernel[(blocks_of(tokens, rows),)](
        x, x.stride(0), scales if factors is None else factors, values, scales, tokens, CHANNELS=channels,
        WITH_FACTORS=factors is not None, TOKENS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _rows_at_once(channels: int, *, with_factors: bool) -> tuple[int, int, int]:
    """(tokens of a program, channels that it reads at a time, warps): the fastest on an H200."""
    block = power_of_two(channels)
    if block > AT_ONCE:
        return 2, CHANNELS, 16
    if block > 16384 and with_factors:
        return 2, block, 8
    return (1, block, 8) if block > 8192 else (2, block, 4)


def quantise_columns(x: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fills out (e4m3 [channels, T or more]); returns the channels' scales."""
    tokens, channels = x.shape
    most = torch.zeros(channels, dtype=torch.float32, device=x.device)
    scales = torch.empty_like(most)
    grid = blocks_of(tokens, MAXIMA_TILES * MAXIMA_TOKENS), blocks_of(channels, MAXIMA_COLUMNS)
    _column_maxima_kernel[grid](
        x, x.stride(0), factors, most, tokens, channels,
        TILES=MAXIMA_TILES, TOKENS=MAXIMA_TOKENS, COLUMNS=MAXIMA_COLUMNS, num_warps=4,
    )  # fmt: skip
    _round_columns_kernel[_tiles(x)](
        x, x.stride(0), factors, most, scales, out, out.stride(0), tokens, channels,
        TOKENS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return scales


def round_nf4(packed: torch.Tensor, state: QuantState, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (e4m3 [out, in], any strides) from a weight's packed bytes and double-quantised statistics.

    Not fused, for the same reason as in `fitune.model.nf4_triton`.
    """
    rows, columns = out.shape
    nested = state.state2
    _round_nf4_kernel[_tiles(out)](
        packed, state.absmax, nested.code, nested.absmax, state.offset, state.code, scales, out, *out.stride(), rows,
        BLOCKS=columns // 64, PER_NESTED=nested.blocksize, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def round_matrix(matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """The same from a matrix [out, in]."""
    _round_matrix_kernel[_tiles(out)](
        matrix, matrix.stride(0), scales, out, *out.stride(), *out.shape, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )


def transpose(values: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out ([out, in], its columns each in a row of memory) with values (e4m3 [out, in], contiguous)."""
    rows, columns = values.shape
    grid = blocks_of(rows, SIDE), blocks_of(columns, SIDE)
    _transpose_kernel[grid](
        values.view(torch.uint8), out.view(torch.uint8), out.stride(1), rows, columns, SIDE=SIDE, num_warps=8
    )


def _tiles(matrix: torch.Tensor) -> tuple[int, int]:
    return blocks_of(matrix.shape[0], ROWS), blocks_of(matrix.shape[1], COLUMNS)
