"""What this process may use of its machine: RAM and cores, as the kernel has them and as cgroups limit them.

Docker, Kubernetes and Slurm limit what they start by control groups; /proc/meminfo shows the whole machine all the
same. A group's limit holds for all groups inside it, so the smallest one on the way up counts.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GIB = 2**30
_NO_LIMIT = 2**60  # cgroup v1 writes a number of this size where there is none


def host_memory_gib(root: Path = Path("/")) -> tuple[float, float]:
    """(all of it, what new processes can take without swapping)."""
    total, available = _meminfo(root)
    for limit, used in _memory_limits(root):
        total, available = min(total, limit), min(available, limit - used)
    return total / GIB, max(0.0, available) / GIB


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, whole ones, at least one."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([own, *(math.floor(share) for share in _cpu_shares(root))]))


def _meminfo(root: Path) -> tuple[float, float]:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages, pages


def _memory_limits(root: Path) -> Iterator[tuple[float, float]]:
    """(limit, used) of each group with a limit, in bytes. Files that could be dropped are not counted as used."""
    for folder in _groups(root, "memory"):
        if (limit := _number(folder / "memory.max")) is not None:  # version 2
            used = (_number(folder / "memory.current") or 0) - _statistic(folder, "inactive_file")
        elif (limit := _number(folder / "memory.limit_in_bytes")) is not None:
            used = (_number(folder / "memory.usage_in_bytes") or 0) - _statistic(folder, "total_inactive_file")
        else:
            continue
        if limit < _NO_LIMIT:
            yield limit, max(0, used)


def _cpu_shares(root: Path) -> Iterator[float]:
    """Cores' worth of time that each group with a limit may use."""
    for folder in _groups(root, "cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()  # version 2
            if quota != "max":
                yield int(quota) / int(period)
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            yield quota / period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups, from its own up to the topmost.

    In a container the path in /proc may be the host's, of which only the end is mounted: then only the top is there.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup"
            own_mounts = [mount / name for name in (controllers, controller) if controllers]
            top = next((folder for folder in own_mounts if folder.is_dir()), mount)
            own = top / path.lstrip("/")
            while own != top and own.is_relative_to(top):
                yield own
                own = own.parent
            yield top


def _number(file: Path) -> int | None:
    """None where the file is missing, or says max."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _statistic(folder: Path, name: str) -> int:
    with suppress(OSError, ValueError, StopIteration):
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == name)
    return 0
