"""What this machine has, found without torch: its GPUs by nvidia-smi, its RAM as far as this process may use it."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from fitune.config.host_limits import host_memory_gib
from fitune.planning.machine import Gpu, Machine
from fitune.planning.sizes import GIB

PCIE_GB_S_PER_LANE = {1: 0.25, 2: 0.5, 3: 1.0, 4: 2.0, 5: 4.0, 6: 8.0}
"By generation, per direction."
FIELDS = ("uuid", "name", "memory.total", "memory.free")
MORE_FIELDS = ("compute_cap", "pcie.link.gen.max", "pcie.link.width.current", "mig.mode.current")
"What older drivers don't tell. The link's generation falls while a GPU idles, so the highest counts; its width stays."
SLICES, FEWER_SLICES = 7, {"A30": 4, "RTX PRO": 4}
"Into how many parts of its cores a GPU can be divided (MIG user guide, supported profiles)."
_MIG = re.compile(r"^\s+MIG (?:\d+c\.)?(\d+)g\.(\d+)gb\S*\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)")


def this_machine() -> Machine:
    """GPUs by nvidia-smi (those in CUDA_VISIBLE_DEVICES), RAM by the kernel and the process's cgroup."""
    total, available = host_memory_gib()
    return Machine(_visible(_nvidia_smi(total, available)), total, available)


def free_disk_gib(path: Path) -> float:
    """Free space where `path` is, or would be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / GIB


def _nvidia_smi(host_total: float, host_available: float) -> list[Gpu]:
    """GPUs in nvidia-smi's order, instances in place of a divided one; none where it is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return []
    for fields in (FIELDS + MORE_FIELDS, FIELDS):
        lines = _answer(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        rows = [dict(zip(fields, (part.strip() for part in line.split(",")), strict=False)) for line in lines]
        if rows and all(len(row) == len(fields) for row in rows):
            break
    else:
        return []
    gpus = [_gpu(row, str(number), host_total, host_available) for number, row in enumerate(rows)]
    divided = {row["uuid"] for row in rows if row.get("mig.mode.current") == "Enabled"}
    return _with_instances([gpu for gpu in gpus if gpu], divided) if divided else [gpu for gpu in gpus if gpu]


def _answer(*flags: str) -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def _gpu(row: dict[str, str], number: str, host_total: float, host_available: float) -> Gpu | None:
    """From one answer; None if it makes no sense. A GPU without memory of its own shares the machine's."""
    total, free = _number(row["memory.total"]), _number(row["memory.free"])
    generation, width = _number(row.get("pcie.link.gen.max")), _number(row.get("pcie.link.width.current"))
    unified = total is None
    if unified and "[" not in row["memory.total"]:
        return None
    return Gpu(
        name=row["name"],
        total_gib=host_total if unified else total / 1024,
        free_gib=host_available if unified else (free or 0.0) / 1024,
        capability=_number(row.get("compute_cap")),
        link_gb_s=PCIE_GB_S_PER_LANE.get(int(generation), 2.0) * width if generation and width else None,
        unified=unified,
        identity=row["uuid"],
        shown_as=number,
    )


def _with_instances(gpus: list[Gpu], divided: set[str]) -> list[Gpu]:
    """Instances by `nvidia-smi -L`, under the GPU they are part of: `MIG 3g.40gb Device 0: (UUID: MIG-...)`."""
    found, whole = [], None
    by_identity = {gpu.identity: gpu for gpu in gpus}
    for line in _answer("-L"):
        if instance := _MIG.match(line):
            slices, gigabytes, identity = instance.groups()
            if whole:
                gib = min(float(gigabytes) * 1e9 / GIB, whole.total_gib)
                name = f"{whole.name} MIG {slices}g.{gigabytes}gb"
                share = int(slices) / next((n for name, n in FEWER_SLICES.items() if name in whole.name), SLICES)
                found.append(replace(whole, name=name, total_gib=gib, free_gib=gib, share=share,
                                     identity=identity, shown_as=identity))  # fmt: skip
        elif identity := re.search(r"UUID: (GPU-[^)]+)\)", line):
            whole = by_identity.get(identity[1])
            if whole and whole.identity not in divided:
                found.append(whole)
                whole = None
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _visible(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Those that CUDA shows a process: named in CUDA_VISIBLE_DEVICES, and of instances (MIG) one at most."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = gpus if chosen is None else _named(gpus, [name.strip() for name in chosen.split(",")])
    instances = [gpu for gpu in shown if gpu.identity.startswith("MIG-")]
    return tuple(instances[:1] or shown)


def _named(gpus: list[Gpu], names: list[str]) -> list[Gpu]:
    """In the order of the names, up to the first that names none, as CUDA has it."""
    found = []
    for name in names:
        by_index = [gpus[int(name)]] if name.isdigit() and int(name) < len(gpus) else []
        by_identity = [gpu for gpu in gpus if len(name) > 4 and gpu.identity.startswith(name)]
        if not (by_index or by_identity):
            break
        found += (by_index or by_identity)[:1]
    return found
