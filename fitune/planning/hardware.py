"""What this machine has, found without torch: its GPUs by nvidia-smi, its RAM as far as this process may use it."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from fitune.config.host_limits import host_memory_gib
from fitune.errors import UsageError
from fitune.planning.gpu_models import GpuModel, likely_model, look_up
from fitune.planning.sizes import GIB

PCIE_GB_S_PER_LANE = {1: 0.25, 2: 0.5, 3: 1.0, 4: 2.0, 5: 4.0, 6: 8.0}
"By generation, per direction."
FIELDS = ("uuid", "name", "memory.total", "memory.free")
MORE_FIELDS = ("compute_cap", "pcie.link.gen.max", "pcie.link.width.current", "mig.mode.current")
"What older drivers don't tell. The link's generation falls while a GPU idles, so the highest counts; its width stays."
_MIG = re.compile(r"^\s+MIG (?:\d+c\.)?(\d+)g\.(\d+)gb\S*\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)")


@dataclass(frozen=True)
class Gpu:
    name: str
    total_gib: float
    free_gib: float
    "What other processes leave."
    capability: float | None = None
    link_gb_s: float | None = None
    "Of its PCI Express lanes, per direction; None where nvidia-smi does not tell."
    unified: bool = False
    "Its memory is the machine's RAM."
    share: float = 1.0
    "Of a whole GPU's cores: below 1 for an instance of a GPU that was divided (MIG)."
    identity: str = ""
    "UUID."

    @property
    def known_model(self) -> GpuModel | None:
        """What it can do through the link it has; None if the table does not have it."""
        model = look_up(self.name)
        return None if model is None else self._here(model)

    @property
    def model(self) -> GpuModel:
        """The same; a GPU that the table does not have gets rates to choose by, and is not timed."""
        return self._here(likely_model(self.total_gib, self.name or None))

    def _here(self, model: GpuModel) -> GpuModel:
        if self.capability:
            model = replace(model, capability=self.capability)
        if self.share < 1:
            model = replace(
                model, name=self.name, bf16_tflops=model.bf16_tflops * self.share,
                memory_gb_s=model.memory_gb_s * self.share,
            )  # fmt: skip
        if self.link_gb_s and self.link_gb_s < model.host_link_gb_s and not self.unified:
            peer = model.peer_link_gb_s if model.has_nvlink else self.link_gb_s / 2
            model = replace(model, host_link_gb_s=self.link_gb_s, peer_link_gb_s=peer)
        return model


@dataclass(frozen=True)
class Machine:
    gpus: tuple[Gpu, ...]
    host_total_gib: float
    host_available_gib: float
    "What new processes can take without swapping."

    @property
    def gpu_memory_gib(self) -> float:
        """Free memory of the fullest GPU: every rank needs as much."""
        return min((gpu.free_gib for gpu in self.gpus), default=0.0)

    @property
    def unified(self) -> bool:
        """GPU and RAM are one memory: what one takes the other lacks."""
        return any(gpu.unified for gpu in self.gpus)

    @property
    def model(self) -> GpuModel | None:
        """What its slowest GPU can do: the others wait for it. None without one."""
        return min((gpu.model for gpu in self.gpus), key=lambda model: model.bf16_tflops, default=None)

    @property
    def known_model(self) -> GpuModel | None:
        """The same; None also where the table does not have one of them."""
        models = [gpu.known_model for gpu in self.gpus]
        return None if None in models else min(models, key=lambda model: model.bf16_tflops, default=None)

    @property
    def uneven(self) -> str | None:
        """What to know about cards of different sizes, in one line."""
        sizes = [round(gpu.free_gib, 1) for gpu in self.gpus]
        if len(sizes) < 2 or max(sizes) < 1.2 * min(sizes):
            return None
        large = ",".join(str(n) for n, size in enumerate(sizes) if size >= 1.2 * min(sizes))
        return (
            f"the GPUs have {', '.join(f'{size:g}' for size in sizes)} GiB free: the smallest counts for all; without "
            f"it: CUDA_VISIBLE_DEVICES={large}"
        )

    def refuse_missing_bf16(self) -> None:
        """Raises UsageError if one of its GPUs cannot compute in bf16."""
        lacking = [n for n, gpu in enumerate(self.gpus) if not gpu.model.has_bf16]
        if not lacking:
            return
        name, capability = self.gpus[lacking[0]].name, self.gpus[lacking[0]].model.capability
        others = ",".join(str(n) for n in range(len(self.gpus)) if n not in lacking)
        instead = f"leave it out: CUDA_VISIBLE_DEVICES={others}" if others else "use a newer GPU"
        raise UsageError(
            f"{name} has compute capability {capability:.1f} and no bf16, in which fitune trains (8.0 and later: "
            f"RTX 30, A10, A100, L4 and newer); {instead}"
        )


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
    gpus = [_gpu(row, host_total, host_available) for row in rows]
    divided = {row["uuid"] for row in rows if row.get("mig.mode.current") == "Enabled"}
    return _with_instances([gpu for gpu in gpus if gpu], divided) if divided else [gpu for gpu in gpus if gpu]


def _answer(*flags: str) -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def _gpu(row: dict[str, str], host_total: float, host_available: float) -> Gpu | None:
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
                found.append(replace(whole, name=name, total_gib=gib, free_gib=gib, share=int(slices) / 7,
                                     identity=identity))  # fmt: skip
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
    instances = [gpu for gpu in shown if gpu.share < 1]
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
