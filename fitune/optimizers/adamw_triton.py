"""The Triton kernel of `fitune.optimizers.adamw_step`, which says what it computes. Imported on GPUs alone.

One program works on BLOCKS blocks: it reads weight, gradient, codes and scales once and writes them once, 12 bytes an
element in all. Element counts are the grid, so no weight compiles anything anew; computing is in float32.
"""

import torch
import triton
import triton.language as tl

from fitune.model.elementwise_triton import mix
from fitune.model.grid import blocks_of
from fitune.optimizers.moment import Code, Moment, Step

BLOCKS = 8  # of one program


@triton.jit
def _nearest_code(x, middles, starts):
    """`fitune.optimizers.moment.Code`: which of 256 numbers is nearest to x."""
    start = tl.load(starts + (x.to(tl.uint32, bitcast=True) >> 16)).to(tl.int32)
    return start + (x > tl.load(middles + start)).to(tl.int32)


@triton.jit
def _pack(exact, values, elements, scales, blocks, middles, starts, inside, smallest):
    scale = tl.max(tl.abs(exact), 1)
    tl.store(scales + blocks, scale, mask=inside)
    shares = exact / tl.where(scale > 0.0, scale, 1.0)[:, None]
    found = tl.maximum(_nearest_code(shares, middles, starts), smallest)
    tl.store(values + elements, found.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _unpack(values, elements, scales, blocks, code, inside):
    places = tl.load(values + elements, mask=inside[:, None], other=0).to(tl.int32)
    return tl.load(code + places) * tl.load(scales + blocks, mask=inside, other=0.0)[:, None]


@triton.jit(do_not_specialize=["count", "key", "first_element"])
def _adamw_kernel(weight, gradient, mean, mean_scales, root, root_scales, signed, signed_middles, signed_starts,
                  unsigned, unsigned_middles, unsigned_starts, count, shrink, rate, beta1, beta2, eps, correction,
                  gradient_scale, key, first_element, smallest,
                  STOCHASTIC: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < count
    elements = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None]
    g = tl.load(gradient + elements, mask=mask, other=0.0).to(tl.float32) * gradient_scale
    m = _unpack(mean, elements, mean_scales, blocks, signed, inside)
    m += (g - m) * (1.0 - beta1)
    v = _unpack(root, elements, root_scales, blocks, unsigned, inside)
    v = tl.sqrt(v * v * beta2 + g * g * (1.0 - beta2))
    _pack(m, mean, elements, mean_scales, blocks, signed_middles, signed_starts, inside, 0)
    _pack(v, root, elements, root_scales, blocks, unsigned_middles, unsigned_starts, inside, smallest)
    exact = tl.load(weight + elements, mask=mask, other=0.0).to(tl.float32) * shrink
    exact -= rate * m / (v / correction + eps)
    if STOCHASTIC:
        places = (elements + first_element).to(tl.uint32)
        drawn = mix((places * 0x9E3779B1) ^ key.to(tl.uint32)) & 0xFFFF
        bits = (exact.to(tl.uint32, bitcast=True) + drawn) & 0xFFFF0000
        exact = bits.to(tl.float32, bitcast=True)
    tl.store(weight + elements, exact.to(weight.dtype.element_ty), mask=mask)


def update_rows(
    weight: torch.Tensor, gradient: torch.Tensor, mean: Moment, root: Moment, step: Step,
    codes: tuple[Code, Code], smallest: int,
) -> None:  # fmt: skip
    """`fitune.optimizers.adamw_step.update_rows` of contiguous tensors whose moments have scales."""
    count = mean.scales.numel()
    with torch.cuda.device(weight.device):
        _adamw_kernel[(blocks_of(count, BLOCKS),)](
            weight, gradient, mean.values, mean.scales, root.values, root.scales, *codes[0], *codes[1], count,
            1.0 - step.rate * step.decay, step.rate / (1.0 - step.beta1**step.number), step.beta1, step.beta2,
            step.eps, (1.0 - step.beta2**step.number) ** 0.5, step.gradient_scale, step.key, step.first_element,
            smallest, STOCHASTIC=step.stochastic, BLOCKS=BLOCKS, BLOCK=mean.block,
        )  # fmt: skip
