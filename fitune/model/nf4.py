"""A frozen linear layer whose weight is stored in bitsandbytes' NF4 format and can be sharded by FSDP2."""

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState
from torch import nn

from fitune.config.tiles import NF4_BLOCK

BLOCK = NF4_BLOCK  # weights per absmax
NESTED_BLOCK = 256  # absmax values per second-level absmax (double quantisation)
STORAGE = torch.float32
"""Dtype that the packed bytes wear (8 weights in one element).

FSDP2 all-gathers a parameter group in its parameters' common dtype, but as raw bytes if the dtypes differ. bf16 storage
next to bf16 norms is gathered as bf16, and on a GPU that copy goes through float and rewrites every NaN pattern, which
corrupts the weights (bitsandbytes-foundation/bitsandbytes#1945). float32 storage never equals the compute dtype of the
other weights in its group, so the group is gathered as bytes; `fitune.model.sharding` refuses a group where it would
not be.
"""


class NF4Linear(nn.Linear):
    """`nn.Linear` over a packed NF4 weight; a bias keeps full precision.

    `weight` has shape [out_features * in_features / 8, 1] and dtype `STORAGE`; sharding cuts it along dimension 0.
    `quant_state` (absmax per 64 weights, itself quantised) is small, whole on every rank,
    and set by `fitune.weights.load`.
    """

    def __init__(self, in_features: int, out_features: int, device=None, *, bias: bool = False, dtype=None):
        if in_features * out_features % 8:
            raise ValueError(f"NF4 packs 8 weights per element: {out_features} x {in_features} is not a multiple of 8")
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        packed = torch.empty(in_features * out_features // 8, 1, dtype=STORAGE, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.quant_state: QuantState | None = None

    def reset_parameters(self):
        """Packed weights are loaded, never initialised."""

    @property
    def is_as_kernels_read_it(self) -> bool:
        """In blocks of 64 with double quantisation, bitsandbytes' default."""
        return self.quant_state.nested and self.quant_state.blocksize == BLOCK

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.weight.view(torch.uint8).view(-1, 1)
        return matmul_4bit(x, packed, quant_state=self.quant_state, bias=self.bias)
