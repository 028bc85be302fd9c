"""The kernel of `fitune.model.head_loss.fold`, which says what it computes. Imported on GPUs alone.

One program per token. It goes through its row of logits twice: each lane sums up its own columns, and they are joined
at the end; then the gradient takes the logits' place. The second reading comes from the cache.
"""

import torch
import triton
import triton.language as tl

from fitune.model.grid import power_of_two
from fitune.model.launched import Launched

BLOCK, WARPS = 4096, 8  # columns at a time: 16 for each thread


@Launched
@triton.jit
def _kernel(logits, targets, found,
            VOCABULARY: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row, target, found = logits + token * VOCABULARY, tl.load(targets + token), found + token * 3
    largest = tl.full((BLOCK,), -1e38, tl.float32)  # finite: lanes beyond the vocabulary must not give a NaN
    before = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, weighted, chosen = largest * 0, largest * 0, largest * 0
    for start in range(0, VOCABULARY, BLOCK):
        column = start + columns
        inside = column < VOCABULARY
        z = tl.load(row + column, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, z)
        shrink, power = tl.exp(largest - new), tl.exp(z - new)
        total = total * shrink + power
        weighted = weighted * shrink + tl.where(inside, power * z, 0.0)
        chosen += tl.where(column == target, z, 0.0)
        before = tl.maximum(before, tl.where(column < target, z, float("-inf")))
        largest = new
    most = tl.max(largest)
    shrink = tl.exp(largest - most)
    sum_of_powers = tl.sum(total * shrink)
    log_total, at_target = most + tl.log(sum_of_powers), tl.sum(chosen)
    tl.store(found, log_total - at_target)
    tl.store(found + 1, log_total - tl.sum(weighted * shrink) / sum_of_powers)
    tl.store(found + 2, ((at_target >= most) & (at_target > tl.max(before))).to(tl.float32))
    if GRADIENT:
        for start in range(0, VOCABULARY, BLOCK):
            column = start + columns
            inside = column < VOCABULARY
            z = tl.load(row + column, mask=inside, other=float("-inf")).to(tl.float32)
            probability = tl.exp(z - log_total)
            tl.store(row + column, tl.where(column == target, probability - 1.0, probability), mask=inside)


def fold(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> torch.Tensor:
    tokens, vocabulary = logits.shape
    found = torch.empty(tokens, 3, device=logits.device)
    block = min(BLOCK, power_of_two(vocabulary))
    constants = {"VOCABULARY": vocabulary, "GRADIENT": gradient, "BLOCK": block}
    _kernel[(tokens,)](logits, targets, found, **constants, num_warps=WARPS)
    return found
