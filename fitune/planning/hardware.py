"""What this machine has, found without torch, and what GPU models can do."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fitune.errors import UsageError
from fitune.planning.sizes import GIB


@dataclass(frozen=True)
class Gpu:
    name: str
    total_gib: float
    free_gib: float


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
    def model(self) -> "GpuModel | None":
        """What its first GPU can do; None without one."""
        return likely_model(self.gpus[0].total_gib, self.gpus[0].name) if self.gpus else None

    @property
    def known_model(self) -> "GpuModel | None":
        """The same; None also where the table does not have it."""
        return _look_up(self.gpus[0].name) if self.gpus else None


def this_machine() -> Machine:
    """GPUs by nvidia-smi (those in CUDA_VISIBLE_DEVICES), RAM by /proc/meminfo."""
    total, available = _host_memory()
    return Machine(_visible(_nvidia_smi()), total, available)


def free_disk_gib(path: Path) -> float:
    """Free space where `path` is, or would be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / GIB


def _nvidia_smi() -> list[tuple[str, Gpu]]:
    """(UUID, GPU) in nvidia-smi's order; none where it is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        return [(uuid, Gpu(name, float(total) / 1024, float(free) / 1024)) for uuid, name, total, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _visible(gpus: list[tuple[str, Gpu]]) -> tuple[Gpu, ...]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(gpu for _, gpu in gpus)
    names = [name.strip() for name in chosen.split(",") if name.strip()]

    def is_chosen(index: int, uuid: str) -> bool:
        return any(name == str(index) or (len(name) > 4 and uuid.startswith(name)) for name in names)

    return tuple(gpu for index, (uuid, gpu) in enumerate(gpus) if is_chosen(index, uuid))


def _host_memory() -> tuple[float, float]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        return kib["MemTotal"] * 1024 / GIB, kib["MemAvailable"] * 1024 / GIB
    except (OSError, KeyError, ValueError, IndexError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        return pages, pages


@dataclass(frozen=True)
class GpuModel:
    """Peak rates of one GPU, as its data sheet states them."""

    name: str
    "As it appears in nvidia-smi's name."
    capability: float
    "Compute capability: from 8.9 on it multiplies fp8 at twice the rate of bf16."
    bf16_tflops: float
    "Dense tensor-core products with float32 sums."
    memory_gb_s: float
    host_link_gb_s: float
    "Per direction: PCI Express 4 x16 carries 32, 5 x16 carries 64."
    peer_link_gb_s: float
    "To another GPU of the machine, per direction: NVLink, or half the host link where traffic goes through host RAM."
    source: str


GPU_MODELS = [
    GpuModel("B200", 10.0, 2250, 8000, 64, 900, "NVIDIA DGX B200 data sheet, per GPU"),
    GpuModel("H200", 9.0, 989, 4800, 64, 450, "NVIDIA H200 data sheet (SXM)"),
    GpuModel("H100 PCIe", 9.0, 756, 2000, 64, 32, "NVIDIA H100 data sheet (PCIe)"),
    GpuModel("H100", 9.0, 989, 3350, 64, 450, "NVIDIA H100 data sheet (SXM)"),
    GpuModel("A100-PCIE", 8.0, 312, 1555, 32, 16, "NVIDIA A100 data sheet (PCIe)"),
    GpuModel("A100", 8.0, 312, 2039, 32, 300, "NVIDIA A100 data sheet (SXM, 80 GB)"),
    GpuModel("L40S", 8.9, 362, 864, 32, 16, "NVIDIA L40S data sheet"),
    GpuModel("L4", 8.9, 121, 300, 16, 8, "NVIDIA L4 data sheet"),
    GpuModel("RTX PRO 6000", 12.0, 500, 1792, 64, 32, "NVIDIA RTX PRO 6000 data sheet"),
    GpuModel("RTX 6000 Ada", 8.9, 364, 960, 32, 16, "NVIDIA RTX 6000 Ada data sheet"),
    GpuModel("A6000", 8.6, 155, 768, 32, 16, "NVIDIA RTX A6000 data sheet"),
    GpuModel("A10", 8.6, 125, 600, 32, 16, "NVIDIA A10 data sheet"),
    GpuModel("RTX 5090", 12.0, 209, 1792, 64, 32, "NVIDIA RTX Blackwell architecture paper"),
    GpuModel("RTX 4090", 8.9, 165, 1008, 32, 16, "NVIDIA Ada architecture paper, appendix A"),
    GpuModel("RTX 3090", 8.6, 71, 936, 32, 16, "NVIDIA GA102 architecture paper, appendix A"),
    GpuModel("RTX 3060", 8.6, 25, 360, 32, 16, "NVIDIA GA102 architecture paper, scaled by SMs and clock"),
]
"""More specific names before their beginnings."""

TYPICAL_BY_MEMORY_GIB = [
    (14, "RTX 3060"), (30, "RTX 4090"), (34, "RTX 5090"), (44, "A100"), (60, "A6000"), (90, "H100"),
]  # fmt: skip
"""The model assumed for a profile that says only how much memory its GPUs have, up to so many GiB."""


def gpu_model(name: str) -> GpuModel:
    """The table's entry for a GPU by name, as nvidia-smi spells it or shorter. Raises UsageError."""
    found = _look_up(name)
    if found is None:
        raise UsageError(f"GPU model '{name}' is not in the table: {', '.join(model.name for model in GPU_MODELS)}")
    return found


def likely_model(memory_gib: float, name: str | None = None) -> GpuModel:
    """The entry for a GPU found here, or the typical model with so much memory."""
    typical = next((typical for limit, typical in TYPICAL_BY_MEMORY_GIB if memory_gib <= limit), "H200")
    return (_look_up(name) if name else None) or gpu_model(typical)


def _look_up(name: str) -> GpuModel | None:
    words = name.lower().replace("-", " ")
    for model in GPU_MODELS:
        if re.search(rf"\b{model.name.lower().replace('-', ' ')}g?\b", words):
            return model
    return None
