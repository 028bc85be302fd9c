"""Whether the ranks of one machine have room to meet in shared memory: a container has little unless it is told."""

import shutil
from pathlib import Path

PLACE = Path("/dev/shm")
NEEDED_GIB = 1
"More than NCCL takes for the GPUs of one machine."


def short_of_shared_memory(place: Path = PLACE) -> tuple[str, str] | None:
    """(what is wrong, what to do); None where there is enough. NCCL's ranks meet there; Docker gives 64 MiB."""
    free = shutil.disk_usage(place).free if place.is_dir() else 0
    if free >= NEEDED_GIB * 2**30:
        return None
    said = f"{place} has {free / 2**20:.0f} MiB free; ranks of one machine exchange data there"
    return said, f"start the container with --shm-size={NEEDED_GIB}g"
