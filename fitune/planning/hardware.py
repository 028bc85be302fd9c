"""What this machine has, found without torch: its GPUs by nvidia-smi, its RAM as far as this process may use it."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from xml.etree import ElementTree

from fitune.config.host_limits import host_memory_gib
from fitune.environment import GPU_CAP, number
from fitune.planning.machine import IDENTITIES, Gpu, Machine
from fitune.planning.memory import MEASURED
from fitune.planning.sizes import GIB

VISIBLE = "CUDA_VISIBLE_DEVICES"
PCIE_GB_S_PER_LANE = {1: 0.25, 2: 0.5, 3: 1.0, 4: 2.0, 5: 4.0, 6: 8.0}
"By generation, per direction."
FIELDS = ("uuid", "name", "memory.total", "memory.free")
MORE_FIELDS = ("compute_cap", "pcie.link.gen.max", "pcie.link.width.current", "mig.mode.current")
"What older drivers don't tell. The link's generation falls while a GPU idles, so the highest counts; its width stays."
SLICES, FEWER_SLICES = 7, {"A30": 4, "RTX PRO": 4}
"Into how many parts of its cores a GPU can be divided (MIG user guide, supported profiles)."
_MIG = re.compile(r"^\s+MIG (?:\d+c\.)?(\d+)g\.(\d+)gb\S*\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")


def this_machine() -> Machine:
    """What is found here; with FITUNE_GPU_CAP_GIB its GPUs are as small as what a rank is held to."""
    machine = found_here()
    return replace(machine, gpus=tuple(map(_held_to_cap, machine.gpus)))


def found_here() -> Machine:
    """GPUs by nvidia-smi (those in CUDA_VISIBLE_DEVICES), RAM by the kernel and the process's cgroup."""
    total, available = host_memory_gib()
    gpus, names = _nvidia_smi(total, available), _names()
    return Machine(_visible(gpus, names), total, available, missing=_missing(gpus, names) if gpus else "")


def _held_to_cap(gpu: Gpu) -> Gpu:
    """The cap is of torch's memory; what lies outside its allocator comes on top."""
    if (cap := number(GPU_CAP)) is None:
        return gpu
    most = cap + MEASURED.outside_allocator / GIB
    return replace(gpu, total_gib=min(gpu.total_gib, most), free_gib=min(gpu.free_gib, most))


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
    gpus = [_gpu(row, number, host_total, host_available) for number, row in enumerate(rows)]
    divided = {row["uuid"] for row in rows if row.get("mig.mode.current") == "Enabled"}
    return _with_instances([gpu for gpu in gpus if gpu], divided) if divided else [gpu for gpu in gpus if gpu]


def _answer(*flags: str) -> list[str]:
    return [line for line in _text(*flags).splitlines() if line.strip()]


def _text(*flags: str) -> str:
    """What nvidia-smi says; '' where it fails or hangs."""
    try:
        return subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpu(row: dict[str, str], number: int, host_total: float, host_available: float) -> Gpu | None:
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
        shown_as=str(number),
        number=number,
    )


def _with_instances(gpus: list[Gpu], divided: set[str]) -> list[Gpu]:
    """Instances by `nvidia-smi -L`, under the GPU they are part of: `MIG 3g.40gb Device 0: (UUID: MIG-...)`."""
    found, whole = [], None
    by_identity, memory = {gpu.identity: gpu for gpu in gpus}, _memory_of_instances()
    for line in _answer("-L"):
        if instance := _MIG.match(line):
            slices, gigabytes, device, identity = instance.groups()
            if whole:
                by_name = min(float(gigabytes) * 1e9 / GIB, whole.total_gib)
                total, free = memory.get((whole.identity, device), (by_name, by_name))
                name = f"{whole.name} MIG {slices}g.{gigabytes}gb"
                share = int(slices) / next((n for name, n in FEWER_SLICES.items() if name in whole.name), SLICES)
                found.append(replace(whole, name=name, total_gib=total, free_gib=free, share=share,
                                     identity=identity, shown_as=identity))  # fmt: skip
        elif identity := re.search(r"UUID: (GPU-[^)]+)\)", line):
            whole = by_identity.get(identity[1])
            if whole and whole.identity not in divided:
                found.append(whole)
                whole = None
    return found


def _memory_of_instances() -> dict[tuple[str, str], tuple[float, float]]:
    """(total, free) GiB of instances, by their GPU's UUID and the number that `nvidia-smi -L` calls Device.

    Only nvidia-smi's XML tells it, and not of all drivers: what is missing there is missing here.
    """
    try:
        log = ElementTree.fromstring(_text("-q", "-x"))
    except ElementTree.ParseError:
        return {}
    found = {}
    for gpu in log.iter("gpu"):
        for instance in gpu.iter("mig_device"):
            total, free = (_mib(instance.findtext(f"fb_memory_usage/{kind}")) for kind in ("total", "free"))
            if total and free is not None:
                key = gpu.findtext("uuid", "").strip(), instance.findtext("index", "").strip()
                found[key] = total / 1024, free / 1024
    return found


def _mib(text: str | None) -> float | None:
    return _number(text.removesuffix("MiB")) if text else None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _names() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, up to an empty name or a number below 0, where CUDA stops reading."""
    chosen = os.environ.get(VISIBLE)
    names = None if chosen is None else [name.strip() for name in chosen.split(",")]
    return names and list(takewhile(lambda name: name and not name.startswith("-"), names))


def _visible(gpus: list[Gpu], names: list[str] | None) -> tuple[Gpu, ...]:
    """Those that CUDA shows a process: named, and of instances (MIG) one at most."""
    shown = gpus if names is None else _named(gpus, names)
    instances = [gpu for gpu in shown if gpu.identity.startswith("MIG-")]
    return tuple(instances[:1] or shown)


def _named(gpus: list[Gpu], names: list[str]) -> list[Gpu]:
    """In the order of the names, up to the first that names none. CUDA shows none where one is named twice."""
    if len(set(names)) < len(names):
        return []
    return list(takewhile(bool, (_of_name(gpus, name, names[0]) for name in names)))


def _of_name(gpus: list[Gpu], name: str, first: str) -> Gpu | None:
    """By number, of a divided GPU its first instance; by identity, maybe cut short, where the `first` name is one."""
    if first.startswith(IDENTITIES):
        known = (gpu for gpu in gpus if name.startswith(IDENTITIES) and gpu.identity.startswith(name))
        return next(known, None)
    return next((gpu for gpu in gpus if name.isdigit() and gpu.number == int(name)), None)


def _missing(gpus: list[Gpu], names: list[str] | None) -> str:
    """What CUDA_VISIBLE_DEVICES asks for that is not there, in one line; '' where all is."""
    if not names:
        return ""
    given = f"{VISIBLE}={','.join(names)}"
    if len(set(names)) < len(names):
        return f"{given} names a GPU twice, and CUDA then shows none; name each once"
    for place, name in enumerate(names):
        if _of_name(gpus, name, names[0]) is None:
            mixed = _of_name(gpus, name, name) is not None
            wrong = "numbers and UUIDs don't mix" if mixed else f"there is no GPU {name} here"
            shown = "those before it alone" if place else "none"
            return f"{given}: {wrong}, and CUDA shows {shown}; there are: {', '.join(gpu.shown_as for gpu in gpus)}"
    return ""
