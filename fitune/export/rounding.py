"""Rounds merged weights up or down at random, so that small updates survive on average."""

import hashlib
import math

import torch

FLOAT32_DIGITS = 23
WORDS = 4  # of 16 random bits in one int64


class StochasticRounding:
    """fp32 -> `dtype`: of the two nearest values the nearer one more often, so that their mean is the fp32 value.

    Rounding to the nearest drops every update that is less than half of a weight's last digit: one in bf16 is 0.4 % of
    the weight, and most of what LoRA adds is less. What `dtype` holds exactly stays as it is.

    An instance rounds one tensor, its rows in their order and as many at a time as one likes: which way each value goes
    depends on `seed`, its place and its value alone. fp16 below 2^-14 is rounded to the nearest.
    """

    def __init__(self, seed: str, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.dtype = dtype
        self._dropped_bits = FLOAT32_DIGITS + round(math.log2(torch.finfo(dtype).eps))
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
        self._generator = torch.Generator(device).manual_seed(number)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 `rows` [n, ...], contiguous, finite, and used up, -> the same in `dtype`. What is too large becomes inf.

        The bits to be dropped, and as many random ones added to them, carry into the digits that stay as often as the
        value is near the next one.
        """
        if self._dropped_bits <= 0:
            return rows.to(self.dtype)
        bits = rows.view(torch.int32)
        bits += self._random_words(rows) >> (16 - self._dropped_bits)
        bits += 1 << (self._dropped_bits - 1)  # those were from minus one half on
        bits &= -1 << self._dropped_bits
        return rows.to(self.dtype)

    def _random_words(self, rows: torch.Tensor) -> torch.Tensor:
        """int16 in the shape of `rows`; every row draws whole int64s, wherever it is cut off from others."""
        width = math.prod(rows.shape[1:])
        drawn = torch.empty(rows.shape[0], -(-width // WORDS), dtype=torch.int64, device=rows.device)
        drawn.random_(-(2**63), None, generator=self._generator)
        return drawn.view(torch.int16)[:, :width].reshape(rows.shape)
