"""Joins this process to the others: device, process group, device mesh."""

import atexit
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fitune.config.schema import Run
from fitune.environment import GPU_CAP, number
from fitune.errors import CRASHED, STOPPED_BY_CTRL_C, UsageError
from fitune.model.sharding import REPLICATE, SHARD, new_mesh

BOTH = "cpu:gloo,cuda:nccl"
SECONDS_FOR_RANK_0 = 30
"What the ranks of a busy machine may take longer than each other to start."
LOOK_SECONDS = 60
"Between two looks whether those have come who are waited for."
_meetings = itertools.count()
"All ranks come to them in the same order."


def join(run: Run) -> DeviceMesh:
    """The mesh over all processes that accelerate launch or torchrun started (or this one alone), as `run` has it.

    CPU tensors travel over gloo and GPU tensors over NCCL, since offloaded parameters and their gradients are CPU
    tensors. Raises UsageError if the launcher started another number of processes than the run was resolved for.
    """
    settings = run.accelerate
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
    if settings.num_machines > 1:
        _meet_on_network_of(os.environ["MASTER_ADDR"])
    if settings.use_cpu:
        dist.init_process_group("gloo", timeout=timedelta(minutes=30))
        return new_mesh("cpu", run)
    device = _own_gpu()
    dist.init_process_group(BOTH, timeout=timedelta(minutes=30), device_id=device)
    return new_mesh("cuda", run, backend_override={REPLICATE: BOTH, SHARD: BOTH})


def _meet_on_network_of(address: str) -> None:
    """Has gloo talk to other machines through the interface by which `address` is reached, unless one is chosen.

    By itself it takes that of the host's name, which on Debian and Ubuntu is the loopback: nobody answers there.
    """
    with suppress(OSError):  # an unknown address is for the store to name, which all connect to first
        family, kind, _, _, machine_0 = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:  # sends nothing
            way.connect(machine_0)
            own = way.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if own in [one.address.partition("%")[0] for one in addresses]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _own_gpu() -> torch.device:
    """The GPU of this rank.

    With FITUNE_GPU_CAP_GIB the ranks of a machine share its GPUs, each held to that much of torch's memory: a tier of
    small cards is tried out on a big one (`benchmarks/tiers.py`). NCCL refuses two ranks of one host on one GPU, so
    each calls itself a host of its own.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if ranks > gpus:
        if not number(GPU_CAP):
            raise UsageError(f"the run needs {ranks} GPUs here, torch sees {gpus}")
        os.environ["NCCL_HOSTID"] = f"host-{int(os.environ['RANK']) // gpus}"
        local_rank %= gpus
        os.environ["LOCAL_RANK"] = str(local_rank)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    hold_to_cap(device)
    return device


def hold_to_cap(device: torch.device) -> None:
    """Gives this process no more of a GPU than FITUNE_GPU_CAP_GIB says."""
    if device.type == "cuda" and (cap_gib := number(GPU_CAP)):
        index = torch.cuda.current_device() if device.index is None else device.index  # torch takes no plain "cuda"
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total), index)


def end_with_launcher() -> None:
    """Has the kernel kill this rank when its launcher is killed: ranks run in sessions of their own (Linux prctl)."""
    set_parent_death_signal = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def as_rank(main: Callable[[], None]) -> NoReturn:
    """Runs `main` as a process of its own, and ends that with its exit code, without taking Python apart.

    Gloo's threads outlive the process group, which DTensor's caches hold. One that lets go of a tensor waits for
    Python, which by then ends it in the middle of C++, and C++ aborts the process: "terminate called without an active
    exception" (https://github.com/pytorch/pytorch/issues/190489; remove this when a destroyed group has no threads).
    Threads that must end, and what is registered to run at the exit, have their turn, as in processes of
    multiprocessing.
    """
    code = 0
    try:
        main()
    except SystemExit as ending:
        code = ending.code or 0
    except BaseException as error:  # what run_stage did not expect ends as Python ends it
        traceback.print_exc()
        code = STOPPED_BY_CTRL_C if isinstance(error, KeyboardInterrupt) else CRASHED
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more, or it is closed
            stream.flush()
    os._exit(code)


def close_process_group(patience: float | None = None) -> None:
    """Closes the process group; gives up after `patience` seconds, since one whose other ranks are gone may wait."""
    if dist.is_initialized():
        closing = threading.Thread(target=_close, daemon=True)
        closing.start()
        closing.join(patience)


def _close() -> None:
    with suppress(RuntimeError):  # another rank is gone, which has been said
        dist.destroy_process_group()


def compute_device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cpu") if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def from_rank_0(value):
    """Rank 0's value on all ranks: what another machine sees of a shared folder may be a moment old."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all_ranks(own, waiting=nullcontext, group: dist.ProcessGroup | None = None) -> list:
    """What each rank gives, on all of them, however long one takes to come here. Call on all ranks.

    `waiting` is entered meanwhile. A `group` of a background thread waits as long as it was made for.
    """
    if not dist.is_initialized():
        return [own]
    if group is None:
        wait_for_all(waiting)
    found = [None] * dist.get_world_size()
    with waiting():
        dist.all_gather_object(found, own, group=group)
    return found


def wait_for_rank_0(event: str, waiting=nullcontext) -> None:
    """Until rank 0 has come to `event`, however long it prepares: no collective's timeout runs. Call on all ranks.

    `waiting` is entered meanwhile. Each event has a name of its own. If rank 0's machine is gone, so is the store:
    raises dist.DistNetworkError.
    """
    if not dist.is_initialized():
        return
    store, key = dist.distributed_c10d._get_default_store(), f"fitune/{event}"
    if is_main_process():
        store.set(key, "1")
        return
    _wait_in_store(store, key, waiting)


def wait_for_all(waiting=nullcontext) -> None:
    """Until all ranks have come here, however long one takes: no collective's timeout runs. Call on all ranks.

    `waiting` is entered meanwhile. A machine that died is the launchers' to notice: they end the ranks.
    """
    if not dist.is_initialized():
        return
    store, key = dist.distributed_c10d._get_default_store(), f"fitune/meeting {next(_meetings)}"
    if store.add(f"{key}/arrived", 1) == dist.get_world_size():
        store.set(key, "1")
    _wait_in_store(store, key, waiting)


def _wait_in_store(store: dist.Store, key: str, waiting) -> None:
    with waiting():
        while True:
            try:
                store.wait([key], timedelta(seconds=LOOK_SECONDS))
            except dist.DistStoreError:
                continue  # not yet
            return


def machine_number() -> int:
    """Of this rank's, from torch's launcher."""
    return int(os.environ.get("GROUP_RANK", 0))


def is_first_to_fail() -> bool:
    """Whether no other rank of this machine has asked before: what several met is told once on each machine."""
    if not dist.is_initialized():
        if not is_main_process():
            time.sleep(SECONDS_FOR_RANK_0)  # it mostly meets the same, tells it, and the launcher ends this one
        return True
    try:
        key = f"fitune/failures/{machine_number()}"
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    except dist.DistNetworkError:
        return True


def take_over_from_accelerate() -> None:
    """`accelerate launch` announces FSDP and mixed precision in the environment; fitune has applied both itself.

    Left in place, accelerate would wrap the sharded model a second time and run it under autocast.
    """
    for name in [name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]:
        del os.environ[name]
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"


def _stand_alone_defaults() -> None:
    """`python -m fitune.training.train run.yaml`, without a launcher, is a world of one."""
    if "WORLD_SIZE" not in os.environ:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
