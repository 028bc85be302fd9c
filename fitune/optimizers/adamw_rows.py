"""torch's AdamW on each rank's own rows as plain tensors. For large ones on a GPU a kernel reads and writes less."""

import math
from collections import defaultdict

import torch
from torch.optim.adamw import adamw

from fitune.model.sharding import local_part
from fitune.optimizers.gradient_norm import clip_gradients, norm_of_gradients, scale_to

LARGE = 2**20
"Elements from which a tensor on a GPU is worth a launch of its own; torch steps many with one."
Part = tuple[torch.Tensor, ...]
"Of one weight, this rank's rows: weight, gradient, both moments, number of steps."


class AdamWOnRows(torch.optim.AdamW):
    """The same step: AdamW works on each element by itself. Weights and states stay the DTensors that they are.

    Of 448 DTensors a step took 29 ms of Python, of as many plain tensors 5 (one core, by hand); the GPU waits for it.
    The fused step takes bf16 gradients of float32 weights, too.
    AdamW's variants (amsgrad, maximize) are not supported, nor a closure.
    """

    _scale: torch.Tensor | None = None
    "What the next step multiplies gradients by, None for 1."

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """The gradients' norm over all ranks, float32; the next step takes them as if it were at most `max_norm`.

        The fused step scales them while it reads them: to scale them before reads and writes all once more. Call on all
        ranks.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not self.defaults["fused"]:
            return clip_gradients(parameters, max_norm)
        norm = norm_of_gradients(parameters)
        if max_norm < math.inf:
            self._scale = scale_to(max_norm, norm)
        return norm

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Changes weights and moments in place."""
        if not self.defaults["fused"]:
            super().step()
            return
        for group in self.param_groups:
            alone, together = [], defaultdict(list)
            for part in self._parts(group):
                (alone if _has_the_kernel(part) else together[part[0].device]).append(part)
            self._step_alone(group, alone)
            for device, parts in together.items():
                step_together(group, parts, self._scale_on(device))
        self._scale = None

    def _scale_on(self, device: torch.device) -> torch.Tensor | None:
        """torch's step would have a copy on its way to host RAM, and read what is there before it."""
        return None if self._scale is None else self._scale.to(device)

    def _step_alone(self, group: dict, parts: list[Part]) -> None:
        if not parts:
            return
        from fitune.optimizers import adamw_float_triton

        device = parts[0][0].device
        scale = torch.ones((), device=device) if self._scale is None else self._scale_on(device)
        torch._foreach_add_([steps for *_, steps in parts], 1)
        for part in parts:
            adamw_float_triton.update(*part, group, scale)

    def _parts(self, group: dict) -> list[Part]:
        """Of the weights that have a gradient."""
        weights, gradients, means, squares, steps = ([] for _ in range(5))
        self._init_group(group, weights, gradients, means, squares, [], steps)
        return list(zip(weights, gradients, means, squares, steps, strict=True))

    def _init_group(self, group: dict, *lists: list[torch.Tensor]) -> bool:
        """`lists`: weights, gradients, both moments and the largest second ones, all filled here; steps."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists[:-1]:
            tensors[:] = map(local_part, tensors)
        return has_complex


def _has_the_kernel(part: Part) -> bool:
    weight, gradient, *_ = part
    in_float32 = all(tensor.dtype == torch.float32 for tensor in part if tensor is not gradient)
    return (
        weight.numel() >= LARGE
        and in_float32
        and gradient.dtype in (torch.float32, torch.bfloat16)
        and all(tensor.is_cuda and tensor.is_contiguous() for tensor in part)
    )


def step_together(group: dict, parts: list[Part], scale: torch.Tensor | None = None) -> None:
    """torch's fused step, one of all parts of a device. `scale`: what gradients are multiplied by, None for 1."""
    if parts:
        weights, gradients, means, squares, steps = map(list, zip(*parts, strict=True))
        gradients = [gradient.to(weight.dtype) for weight, gradient in zip(weights, gradients, strict=True)]
        beta1, beta2 = group["betas"]
        adamw(
            weights, gradients, means, squares, [], steps, fused=True, amsgrad=False, maximize=False, lr=group["lr"],
            beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
            grad_scale=None if scale is None else scale.reciprocal(),
        )  # fmt: skip
