"""NEFTune (2310.05914): noise on the embedded tokens of an example, uniform within alpha / sqrt(tokens x hidden size).

Every number follows from its token's key (`fitune.model.dropout_keys`), so a run draws the same noise on any number of
ranks, in any micro batch and packed row, and after a resume. transformers' own draws by rank, and takes a whole packed
row for one example.
"""

import torch
from torch import nn

from fitune.model.attention import bounds_of_rows
from fitune.model.elementwise import GOLDEN, WORD, mix

PLACE = 0x4E454654
"Tells the noise's numbers from those of dropout, whose places are counted from 0."
TOKENS_AT_ONCE = 256


class EmbeddingNoise:
    """Added to what `embedding` gives in the one pass that follows `prepare`."""

    def __init__(self, embedding: nn.Module, alpha: float):
        self.alpha = alpha
        self._next: tuple[torch.Tensor, torch.Tensor] | None = None
        embedding.register_forward_hook(self._add)

    def prepare(self, keys: torch.Tensor, lengths: torch.Tensor) -> None:
        """`keys` int32 [T], `lengths` [T]: of each token of the batch, that of its example."""
        self._next = keys, lengths

    def _add(self, embedding: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        if self._next is None:
            return output
        keys, lengths = (part.to(output.device) for part in self._next)
        self._next = None
        amplitudes = self.alpha / (lengths.clamp(min=1) * output.shape[-1]).sqrt()
        return output + noise(keys, amplitudes, output.shape[-1]).to(output.dtype).view_as(output)


def noise(keys: torch.Tensor, amplitudes: torch.Tensor, channels: int) -> torch.Tensor:
    """[T, channels] float32, uniform within +- `amplitudes` [T]. A few tokens at a time: the numbers are int64."""
    found = torch.empty(len(keys), channels, device=keys.device)
    columns = torch.arange(channels, device=keys.device) * GOLDEN & WORD
    for start in range(0, len(keys), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        numbers = mix(mix(keys[part].long() & WORD ^ PLACE).unsqueeze(1) ^ columns)
        found[part] = (numbers.float() / 2**31 - 1) * amplitudes[part].float().unsqueeze(1)
    return found


def lengths_of_examples(
    input_ids: torch.Tensor, bounds: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """int64 [rows x length]: for each token of input_ids [rows, length] how many its example has, without padding.

    `bounds` and `attention_mask` as for `dropout_keys`.
    """
    rows, length = input_ids.shape
    if attention_mask is not None:
        return attention_mask.sum(1).repeat_interleave(length)
    if bounds is None:
        bounds = bounds_of_rows(rows, length, input_ids.device)
    lengths = bounds.long().diff()
    return lengths.repeat_interleave(lengths, output_size=rows * length)
