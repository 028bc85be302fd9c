"""NF4 weights dequantised by one kernel, scales included. Imported on GPUs alone.

bitsandbytes takes four launches for a weight with double quantisation: it writes the scales out first.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from fitune.model.grid import blocks_of
from fitune.model.launched import Launched

BLOCKS = 64  # of 64 weights, for one program


@Launched
@triton.jit
def _kernel(
    packed, out, scales, scale_code, nested, offset, code, blocks, PER_NESTED: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = tl.load(scale_code + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    scale = scale * tl.load(nested + block // PER_NESTED, mask=inside, other=0.0) + tl.load(offset)
    byte = tl.arange(0, 32)[None, :]
    pair = tl.load(packed + block[:, None] * 32 + byte, mask=inside[:, None], other=0).to(tl.int32)
    first, second = tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))  # the high half comes first
    weights = tl.reshape(tl.join(first, second), (BLOCKS, 64)) * scale[:, None]
    tl.store(out + block[:, None] * 64 + tl.arange(0, 64)[None, :], weights, mask=inside[:, None])


def dequantise(
    packed: torch.Tensor, state: QuantState, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[out, in] in `dtype` from its packed bytes (uint8), with blocks of 64 and double quantisation.

    In `out`, contiguous, if it is given. bitsandbytes rounds a scale's product before it adds the offset. Fused, the
    two are rounded once, and some weights in 100 million get another last bit in bf16.
    """
    if out is None:
        out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    blocks, nested = out.numel() // 64, state.state2
    _kernel[(blocks_of(blocks, BLOCKS),)](
        packed, out, state.absmax, nested.code, nested.absmax, state.offset, state.code, blocks,
        PER_NESTED=nested.blocksize, BLOCKS=BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
