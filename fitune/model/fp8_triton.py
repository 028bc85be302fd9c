"""Triton kernels of `fitune.model.fp8`, which says what each computes. Imported on GPUs alone.

Numbers of the model are compile-time constants, the number of tokens is the grid: no batch compiles anything anew.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from fitune.model.e4m3 import E4M3, LARGEST, SMALLEST

CHANNELS = 4096  # of one row that a program reads at a time
ROWS, COLUMNS = 64, 128  # of a weight, for one program: whole sectors of memory in both directions

_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)


@triton.jit
def _read(part, factors, start, CHANNELS: tl.constexpr, WITH_FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK channels of a row from `start` on, in float32, those beyond the row 0; which are within)"""
    column = start + tl.arange(0, BLOCK)
    inside = column < CHANNELS
    x = tl.load(part + column, mask=inside, other=0.0).to(tl.float32)
    if WITH_FACTORS:
        x *= tl.load(factors + column, mask=inside, other=0.0)
    return x, inside


@triton.jit
def _quantise_rows_kernel(x, x_row, factors, values, scales, CHANNELS: tl.constexpr,
                          WITH_FACTORS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One token: the largest of its channels, then all of them rounded; the second reading comes from the cache."""
    token = tl.program_id(0).to(tl.int64)
    row = x + token * x_row
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHANNELS, BLOCK):
        part, _ = _read(row, factors, start, CHANNELS, WITH_FACTORS, BLOCK)
        most = tl.maximum(most, tl.abs(part))
    scale = tl.div_rn(tl.maximum(tl.max(most), _SMALLEST), _LARGEST)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scales + token, scale)
    out = values + token * CHANNELS
    for start in range(0, CHANNELS, BLOCK):
        part, inside = _read(row, factors, start, CHANNELS, WITH_FACTORS, BLOCK)
        tl.store(out + start + tl.arange(0, BLOCK), (part * inverse).to(out.dtype.element_ty), mask=inside)


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


def quantise_rows(x: torch.Tensor, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, channels = x.shape
    values = torch.empty(tokens, channels, dtype=E4M3, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    _quantise_rows_kernel[(tokens,)](
        x, x.stride(0), scales if factors is None else factors, values, scales, CHANNELS=channels,
        WITH_FACTORS=factors is not None, BLOCK=min(CHANNELS, triton.next_power_of_2(channels)), num_warps=8,
    )  # fmt: skip
    return values, scales


def round_nf4(packed: torch.Tensor, state: QuantState, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (e4m3 [out, in], any strides) from a weight's packed bytes and double-quantised statistics."""
    rows, columns = out.shape
    nested = state.state2
    _round_nf4_kernel[_tiles(out)](
        packed, state.absmax, nested.code, nested.absmax, state.offset, state.code, scales, out, *out.stride(), rows,
        BLOCKS=columns // 64, PER_NESTED=nested.blocksize, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip


def round_matrix(matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """The same from a matrix [out, in]."""
    _round_matrix_kernel[_tiles(out)](
        matrix, matrix.stride(0), scales, out, *out.stride(), *out.shape, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8
    )


def _tiles(matrix: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(matrix.shape[0], ROWS), triton.cdiv(matrix.shape[1], COLUMNS)
