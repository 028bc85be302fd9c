"""The norm of all gradients over all ranks, and clipping to it, on each rank's own rows as plain tensors.

torch's `clip_grad_norm_` takes DTensors too, but dispatches each of some hundred several times, while the GPU waits.
"""

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from fitune.model.sharding import local_part, shard_group


@torch.no_grad()
def clip_gradients(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scales the model's gradients down in place, so that their norm is at most `max_norm`.

    Returns what it was, float32. Call on all ranks.
    """
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in trained:
        mine = local_part(parameter.grad)
        by_device.setdefault(mine.device, []).append(mine)
    norm = norm_over_ranks(list(map(get_total_norm, by_device.values())), next(map(shard_group, trained), None))
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # 1e-6 as in torch
    if scale.device.type == "cpu" and scale == 1:  # a GPU would be waited for; in RAM each byte costs more than to ask
        return norm
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, scale.to(device))
    return norm


def norm_over_ranks(norms: list[torch.Tensor], group: dist.ProcessGroup | None) -> torch.Tensor:
    """Of all gradients from those of this rank's parts, whose squares are added up over `group`; None: of one rank.

    Several copies of the model take that of the first: unlike GPUs add up in other orders, and weights that were scaled
    by another last bit would no longer be the same.
    """
    device = next((norm.device for norm in norms if norm.is_cuda), torch.device("cpu"))
    square = (
        torch.stack([norm.to(device) for norm in norms]).square().sum() if norms else torch.zeros((), device=device)
    )
    if group:
        dist.all_reduce(square, group=group)
    if dist.is_initialized() and dist.get_world_size() > (group.size() if group else 1):
        dist.broadcast(square, src=0)
    return square.sqrt()
