"""NF4 weights dequantised by one kernel, scales included. Imported on GPUs alone.

bitsandbytes takes four launches for a weight with double quantisation: it writes the scales out first.
"""

import torch
import triton
import triton.language as tl

from fitune.model.grid import blocks_of
from fitune.model.launched import Launched
from fitune.model.nf4 import BLOCK, NF4Linear

BLOCKS = 64  # of 64 weights, for one program


@triton.jit
def _write_weights(packed, scales, scale_code, nested, offset, code, out, program, blocks,
                   PER_NESTED: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    packed = packed.to(tl.pointer_type(tl.uint8), bitcast=True)  # the bytes, whatever dtype they wear
    block = program.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = tl.load(scale_code + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    scale = scale * tl.load(nested + block // PER_NESTED, mask=inside, other=0.0) + tl.load(offset)
    byte = tl.arange(0, 32)[None, :]
    pair = tl.load(packed + block[:, None] * 32 + byte, mask=inside[:, None], other=0).to(tl.int32)
    first, second = tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))  # the high half comes first
    weights = tl.reshape(tl.join(first, second), (BLOCKS, 64)) * scale[:, None]
    tl.store(out + block[:, None] * 64 + tl.arange(0, 64)[None, :], weights, mask=inside[:, None])


@Launched
@triton.jit
def _kernel(packed, scales, scale_code, nested, offset, code, out, blocks,
            PER_NESTED: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    _write_weights(packed, scales, scale_code, nested, offset, code, out, program, blocks, PER_NESTED, BLOCKS)


@Launched
@triton.jit
def _three_kernel(packed, scales, scale_code, nested, offset, code,
                  packed_2, scales_2, scale_code_2, nested_2, offset_2, code_2,
                  packed_3, scales_3, scale_code_3, nested_3, offset_3, code_3, out,
                  FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
                  PER_NESTED: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """FIRST, SECOND, THIRD: the blocks of each weight."""
    UP_TO_SECOND: tl.constexpr = (FIRST + BLOCKS - 1) // BLOCKS
    UP_TO_THIRD: tl.constexpr = UP_TO_SECOND + (SECOND + BLOCKS - 1) // BLOCKS
    program = tl.program_id(0)
    if program < UP_TO_SECOND:
        _write_weights(packed, scales, scale_code, nested, offset, code, out, program, FIRST, PER_NESTED, BLOCKS)
    elif program < UP_TO_THIRD:
        _write_weights(packed_2, scales_2, scale_code_2, nested_2, offset_2, code_2, out + FIRST * 64,
                       program - UP_TO_SECOND, SECOND, PER_NESTED, BLOCKS)  # fmt: skip
    else:
        _write_weights(packed_3, scales_3, scale_code_3, nested_3, offset_3, code_3, out + (FIRST + SECOND) * 64,
                       program - UP_TO_THIRD, THIRD, PER_NESTED, BLOCKS)  # fmt: skip


def dequantise(base: NF4Linear, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """[out, in] in `dtype`, in `out`, contiguous, if it is given.

    bitsandbytes rounds a scale's product before it adds the offset. Fused, the two are rounded once, and some weights
    in 100 million get another last bit in bf16.
    """
    if out is None:
        out = torch.empty(base.quant_state.shape, dtype=dtype, device=base.weight.device)
    blocks = out.numel() // BLOCK
    _kernel[(blocks_of(blocks, BLOCKS),)](*_parts(base), out, blocks, **_constants(base))
    return out


def dequantise_three(bases: list[NF4Linear], out: torch.Tensor) -> torch.Tensor:
    """The weights of three linears, one below the other in `out` [all their outputs, in], by one launch."""
    blocks = [base.quant_state.shape.numel() // BLOCK for base in bases]
    by_weight = dict(zip(("FIRST", "SECOND", "THIRD"), blocks, strict=True))
    parts = (part for base in bases for part in _parts(base))
    programs = sum(blocks_of(count, BLOCKS) for count in blocks)
    _three_kernel[(programs,)](*parts, out, **by_weight, **_constants(bases[0]))
    return out


def _parts(base: NF4Linear) -> tuple[torch.Tensor, ...]:
    state = base.quant_state
    nested = state.state2
    return base.weight, state.absmax, nested.code, nested.absmax, state.offset, state.code


def _constants(base: NF4Linear) -> dict:
    return {"PER_NESTED": base.quant_state.state2.blocksize, "BLOCKS": BLOCKS, "enable_fp_fusion": False}
