"""A number for every token of a batch, from which LoRA's dropout masks follow (`fitune.model.elementwise`).

It depends on the seed, the optimizer step, the example's own tokens and the token's position in it: on nothing that
says which rank, micro batch or packed row the example lies in. So a run draws the same masks on any number of ranks,
and after a resume.
"""

import torch

from fitune.model.attention import bounds_of_rows
from fitune.model.elementwise import GOLDEN, WORD, mix

DROPOUT_KEYS = "dropout_keys"
"The name under which they travel through the model to its layers."


def dropout_keys(
    input_ids: torch.Tensor, bounds: torch.Tensor | None, attention_mask: torch.Tensor | None, seed: int, step: int
) -> torch.Tensor:
    """int32 [rows x length] for input_ids [rows, length].

    `bounds` (int32 [examples + 1]) are those of the examples in a packed row; without them each row is an example, of
    which `attention_mask` hides the padding.
    """
    rows, length = input_ids.shape
    ids = input_ids.reshape(-1)
    if bounds is None:
        bounds = bounds_of_rows(rows, length, ids.device)
    bounds = bounds.long()
    examples = torch.repeat_interleave(
        torch.arange(len(bounds) - 1, device=ids.device), bounds.diff(), output_size=rows * length
    )
    positions = torch.arange(rows * length, device=ids.device) - bounds[examples]
    words = mix(mix(positions * GOLDEN & WORD) ^ ids)
    if attention_mask is not None:
        words = words * attention_mask.reshape(-1)
    fingerprints = torch.zeros(len(bounds) - 1, dtype=torch.long, device=ids.device).index_add_(0, examples, words)
    start = mix(mix(torch.tensor((seed * GOLDEN + step) & WORD)) ^ (step & WORD)).item()
    keys = mix(mix(fingerprints[examples] & WORD ^ start) ^ (positions * GOLDEN & WORD))
    return torch.where(keys > WORD // 2, keys - WORD - 1, keys).int()
