"""What there is: as a profile states it, on this machine, or given on the command line."""

import math
from dataclasses import dataclass, replace

from fitune.config.model_shapes import hub_cache
from fitune.config.schema import Run
from fitune.environment import GPU_CAP, number
from fitune.errors import UsageError
from fitune.planning.hardware import free_disk_gib, this_machine
from fitune.planning.machine import Gpu, Machine
from fitune.planning.sizes import GIB

MOST_GPUS = 128
"Of one machine; the largest have 72. What is fastest is searched for among all their numbers."


@dataclass(frozen=True)
class Limits:
    """What there is, in GiB; None is not checked."""

    gpu: float | None
    "Per GPU."
    host: float
    "Per machine."
    gpus: int
    disk: float | None = None
    "For the run's folder."
    download_disk: float | None = None
    "For the Hub's cache."
    unified: bool = False
    "GPU and host share what `host` says."

    def no_more_than(self, other: "Limits") -> "Limits":
        """The same with the memory of a GPU and of the host that `other` has, where that is less."""
        checked = [gib for gib in (self.gpu, other.gpu) if gib is not None]
        return replace(self, gpu=min(checked, default=None), host=min(self.host, other.host))


def limits_of(run: Run) -> Limits:
    """What the profile says there is."""
    profile, machines = run.profile, run.accelerate.num_machines
    return Limits(profile.gpu_memory_gib, profile.host_memory_gib, profile.num_gpus // machines)


def limits_here(machine: Machine) -> Limits:
    """What is free on a machine."""
    return Limits(machine.gpu_memory_gib, machine.host_available_gib, len(machine.gpus), unified=machine.unified)


def limits_to_fill(run: Run) -> Limits:
    """What the profile says there is, and no more than is free here, if there is a GPU here."""
    stated, here = limits_of(run), limits_for_training(run)
    if stated.gpu is None or here.gpu is None or not here.gpus:
        return stated
    return replace(stated.no_more_than(here), unified=here.unified)


def machine_of(run: Run) -> Machine:
    """This machine with the GPUs that the run's ranks take, and no others."""
    accelerate = run.accelerate
    return this_machine().shown_by(accelerate.gpu_ids).first(accelerate.num_processes // accelerate.num_machines)


def given_machine(gpus: int, gpu_memory: float | None, host_memory: float | None, *, unified: bool = False) -> Machine:
    """A machine described on the command line; without --host-memory its RAM is not what stops a run.

    `unified`: the GPU's memory is all the RAM there is.
    """
    if gpus < 1:
        raise UsageError("--gpus must be 1 or more; for a run without GPUs use --profile cpu_2proc")
    if gpus > MOST_GPUS:
        raise UsageError(
            f"--gpus counts those of one machine, at most {MOST_GPUS}, not {gpus}; for more give --machines N"
        )
    if gpu_memory is None or gpu_memory <= 0:
        raise UsageError("--gpus needs --gpu-memory GIB, above 0: the memory of one GPU")
    host = host_memory if host_memory is not None else math.inf
    host = min(host, gpu_memory) if unified else host
    return Machine((Gpu("", gpu_memory, gpu_memory, unified=unified),) * gpus, host, host)


def limits_for_training(run: Run) -> Limits:
    """What is free here for a run: GPUs, RAM, disk for checkpoints and for the download."""
    limits = _with_shared_gpus(limits_here(machine_of(run)), run)
    saved = sum(file.stat().st_size for file in (run.folder / "checkpoints").rglob("*") if file.is_file())
    return replace(
        limits, disk=free_disk_gib(run.folder) + saved / GIB, download_disk=free_disk_gib(hub_cache())
    )  # a resumed run's checkpoints are there already


def limits_for_asking(run: Run) -> Limits:
    """What is free here for a run that is only asked: on any GPUs where those that it was trained on are not here."""
    here, ranks = this_machine(), run.accelerate.num_processes
    shown = here.shown_by(run.accelerate.gpu_ids)
    return _with_shared_gpus(limits_here((here if shown.missing else shown).first(ranks)), run)


def _with_shared_gpus(limits: Limits, run: Run) -> Limits:
    """With FITUNE_GPU_CAP_GIB ranks may share the machine's GPUs, each held to a part of one."""
    is_shared = number(GPU_CAP) and limits.gpus
    return replace(limits, gpus=run.accelerate.num_processes) if is_shared else limits
