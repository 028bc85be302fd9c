"""Which elements dropout keeps at one place in the model: what formulas and kernels are told about it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Dropout:
    """Which elements of one place in the model are kept. `keys`: int32 [T], one per token."""

    p: float
    keys: torch.Tensor
    place: int
    "A number of its own for every place in the model."

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)

    @property
    def threshold(self) -> int:
        "A kept element's 32-bit number is at least this."
        return int(self.p * 2**32)

    def rows(self, rows: slice) -> "Dropout":
        """The same place for these tokens."""
        return self if rows == slice(None) else Dropout(self.p, self.keys[rows], self.place)
