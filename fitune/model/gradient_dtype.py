"""Method full's gradients of a step's only pass: kept in the dtype that they were computed or added up in.

FSDP2 casts each to its weight's dtype (`foreach_reduce`). That is float32, so that passes may be added up. Where there
is one pass the numbers are the same without it, and 2 bytes of each need not be written, read twice and kept. To be
removed when FSDP2 has a choice for it.
"""

from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from fitune.model.one_rank import OneRankParamGroup
from fitune.model.sharding import parameter_groups


def keep_gradients_as_computed(model: nn.Module) -> None:
    """Of a sharded model, before its first pass. Its optimizer must take gradients in another dtype than weights."""
    for group in parameter_groups(model):
        if not isinstance(group, OneRankParamGroup):
            group.__class__ = UncastParamGroup
        for parameter in group.fsdp_params:
            parameter.sharded_param.grad_dtype = None  # any


class UncastParamGroup(FSDPParamGroup):
    """A unit's parameters whose gradients stay as ranks have added them up."""

    def _init_mp_dtypes(self) -> None:
        super()._init_mp_dtypes()
        self._orig_dtype = None
