"""torch's AdamW on each rank's own rows as plain tensors."""

import torch

from fitune.model.sharding import local_part


class AdamWOnRows(torch.optim.AdamW):
    """The same step: AdamW works on each element by itself. Weights and states stay the DTensors that they are.

    Of 448 DTensors a step took 29 ms of Python, of as many plain tensors 5 (one core, by hand); the GPU waits for it.
    """

    def _init_group(self, group: dict, *lists: list[torch.Tensor]) -> bool:
        """`lists`: weights, gradients, both moments and the largest second ones, all filled here; steps."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists[:-1]:
            tensors[:] = map(local_part, tensors)
        return has_complex
