"""The norm of all gradients over all ranks, and clipping to it, on each rank's own rows as plain tensors.

torch's `clip_grad_norm_` takes DTensors too, but dispatches each of some hundred several times, while the GPU waits.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from fitune.model.sharding import local_part, shard_group


@runtime_checkable
class ClipsInItsStep(Protocol):
    """An optimizer whose step scales gradients on the way: they are not written for it."""

    def clip(self, max_norm: float) -> torch.Tensor:
        """The norm; the next step takes the gradients as if theirs were at most `max_norm`. Call on all ranks."""


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales gradients down in place, so that their norm is at most `max_norm`.

    Returns what it was, float32. Call on all ranks.
    """
    parameters = list(parameters)
    norm = norm_of_gradients(parameters)
    scale = scale_to(max_norm, norm)
    if scale.device.type == "cpu" and scale == 1:  # a GPU would be waited for; in RAM each byte costs more than to ask
        return norm
    for device, gradients in _by_device(parameters).items():
        torch._foreach_mul_(gradients, scale.to(device))
    return norm


def norm_of_gradients(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Over all ranks, float32; 0 without gradients. Call on all ranks."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norms = [_norm(gradients) for gradients in _by_device(trained).values()]
    return norm_over_ranks(norms, next(map(shard_group, trained), None))


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of all of them, on one device. In float32 even of bf16 gradients, whose own norms torch would round to bf16."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)))


def scale_to(max_norm: float, norm: torch.Tensor) -> torch.Tensor:
    """What gradients of this norm are multiplied by: at most 1."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # 1e-6 as in torch


def _by_device(parameters: Iterable[torch.nn.Parameter]) -> dict[torch.device, list[torch.Tensor]]:
    """This rank's rows of the gradients."""
    found: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mine = local_part(parameter.grad)
            found.setdefault(mine.device, []).append(mine)
    return found


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
