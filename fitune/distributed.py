"""Joins this process to the others: device, process group, device mesh."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fitune.config import AccelerateConfig
from fitune.errors import UsageError


def join(settings: AccelerateConfig) -> DeviceMesh:
    """The one-dimensional mesh over all processes that accelerate launch or torchrun started (or this one alone).

    CPU tensors travel over gloo and GPU tensors over NCCL, since offloaded parameters and their gradients are CPU
    tensors. Raises UsageError if the launcher started another number of processes than the run was resolved for.
    """
    _stand_alone_defaults()
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != settings.num_processes:
        raise UsageError(
            f"{world_size} processes were started, the run needs {settings.num_processes} "
            f"(num_processes in {settings.path})"
        )
    if not settings.use_cpu and not torch.cuda.is_available():
        raise UsageError(f"{settings.path} trains on GPUs and torch sees none here; try --profile cpu_2proc")
    take_over_from_accelerate()
    if settings.use_cpu:
        dist.init_process_group("gloo", timeout=timedelta(minutes=30))
        return init_device_mesh("cpu", (world_size,))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(minutes=30), device_id=device)
    return init_device_mesh("cuda", (world_size,))


def leave() -> None:
    """Closes the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def compute_device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cpu") if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def take_over_from_accelerate() -> None:
    """`accelerate launch` announces FSDP and mixed precision in the environment; fitune has applied both itself.

    Left in place, accelerate would wrap the sharded model a second time and run it under autocast.
    """
    for name in [name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]:
        del os.environ[name]
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"


def _stand_alone_defaults() -> None:
    """`python -m fitune.train run.yaml`, without a launcher, is a world of one."""
    if "WORLD_SIZE" not in os.environ:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
