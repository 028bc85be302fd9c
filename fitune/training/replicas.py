"""Several copies of the model: their gradients are added up, and their trained weights stay the same, bit for bit.

Where a copy is sharded, FSDP adds up its gradients. Where each rank has a whole copy of a frozen base, adapters are all
that is trained: their gradients wait on each rank and are added up once a step.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fitune.errors import FituneError
from fitune.model.sharding import Share, local_part
from fitune.training.distributed import from_all_ranks

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"By bytes of an element."
BUCKET_BYTES = 2**26
"Of gradients that travel together, at most, but for one that is larger."


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replaces the gradients of a model that each rank has whole by their mean over all ranks. Call on all ranks.

    A rank without one, whose rows gave none, counts as zeros.
    """
    if isinstance(model, FSDPModule) or dist.get_world_size() == 1:
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in trained]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """In the order given, which is the same on all ranks; all of a bucket have one dtype."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def refuse_replicas_apart(model: nn.Module, share: Share, step: int, waiting=nullcontext) -> None:
    """Raises FituneError on all ranks if a replica's trained weights are not the first one's. Call on all ranks.

    Every replica adds the same gradients to the same weights. A GPU that miscounts, or a weight that one machine alone
    has changed, would else go unseen: only the first replica is saved. `waiting` is entered where ranks wait.
    """
    if dist.get_world_size() == share.shards:
        return
    found = from_all_ranks(_sum_of_bits(model), waiting)
    apart = [rank for rank, number in enumerate(found) if number != found[rank % share.shards]]
    if apart:
        raise FituneError(
            f"step {step}: the weights on rank {apart[0]} are no longer those of rank {apart[0] % share.shards}, whose "
            f"copy they are (profile.replicas): a GPU or its memory may be faulty; go on from an earlier checkpoint, "
            f"or with --set profile.replicas=1"
        )


def _sum_of_bits(model: nn.Module) -> int:
    """Of this rank's rows of all trained weights, read as integers."""
    rows = [local_part(parameter.detach()) for parameter in model.parameters() if parameter.requires_grad]
    sums = [part.contiguous().view(INTEGERS[part.element_size()]).sum(dtype=torch.int64) for part in rows]
    return int(torch.stack([one.to(sums[0].device) for one in sums]).sum())
