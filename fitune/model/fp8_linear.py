"""A frozen linear layer whose weight is kept in fp8, as its products read it (`fitune.model.fp8`)."""

import torch
from torch import nn
from torch.nn import functional as F

from fitune.model.e4m3 import E4M3


class FP8Linear(nn.Linear):
    """`nn.Linear` over a weight W ~ s V, V in e4m3; a bias keeps full precision.

    `weight` is V [out, in], a byte each; sharding cuts it along its rows. `scales` is s, float32 [out]: small, whole on
    every rank, and set by `fitune.weights.load`.
    """

    def __init__(self, in_features: int, out_features: int, device=None, *, bias: bool = False, dtype=None):
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.computed_in = dtype or torch.get_default_dtype()
        "What W is rounded to before it becomes s V, as if it were kept so."
        values = torch.empty(out_features, in_features, dtype=E4M3, device=device)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scales: torch.Tensor | None = None

    def reset_parameters(self):
        """Rounded weights are loaded, never initialised."""

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """s V [out, in], multiplied in float32 and rounded to `dtype` once."""
        return self.weight.to(dtype).mul_(self.scales.unsqueeze(1))  # bf16 holds every number of e4m3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantised(x.dtype), self.bias)
