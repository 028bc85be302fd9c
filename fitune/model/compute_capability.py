"""What a GPU can do, as a number: which attention kernel it gets, and whether it has fp8, follow from it."""

from functools import cache

import torch


@cache
def compute_capability(device: torch.device) -> float | None:
    """Of a GPU, such as 9.0; None on the CPU. As `fitune.planning.machine` has it from nvidia-smi."""
    return float("{}.{}".format(*torch.cuda.get_device_capability(device))) if device.type == "cuda" else None
