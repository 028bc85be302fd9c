"""With hybrid sharding each machine keeps a copy of the trained weights: they must stay the same, bit for bit."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from fitune.errors import FituneError
from fitune.model.sharding import Share, local_part

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"By bytes of an element."


def refuse_replicas_apart(model: nn.Module, share: Share, step: int, waiting=nullcontext) -> None:
    """Raises FituneError on all ranks if a replica's trained weights are not the first one's. Call on all ranks.

    Every replica adds the same gradients to the same weights. A GPU that miscounts, or a weight that one machine alone
    has changed, would else go unseen: only the first replica is saved. `waiting` is entered where ranks wait.
    """
    if dist.get_world_size() == share.shards:
        return
    found = [None] * dist.get_world_size()
    with waiting():
        dist.all_gather_object(found, _sum_of_bits(model))
    apart = [rank for rank, number in enumerate(found) if number != found[rank % share.shards]]
    if apart:
        raise FituneError(
            f"step {step}: the weights on rank {apart[0]} are no longer those of rank {apart[0] % share.shards}, whose "
            f"copy they are (hybrid sharding): a GPU or its memory may be faulty; go on from an earlier checkpoint, or "
            f"with --set profile.hybrid_sharding=false"
        )


def _sum_of_bits(model: nn.Module) -> int:
    """Of this rank's rows of all trained weights, read as integers."""
    rows = [local_part(parameter.detach()) for parameter in model.parameters() if parameter.requires_grad]
    sums = [part.contiguous().view(INTEGERS[part.element_size()]).sum(dtype=torch.int64) for part in rows]
    return int(torch.stack([one.to(sums[0].device) for one in sums]).sum())
