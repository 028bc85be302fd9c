"""What GPU models can do, as their makers state it: compute capability, rates, links, memory.

Products in bf16 with float32 sums, dense. GeForce cards do them at twice the rate of their float32 units, workstation
and server cards at four times, since Ampere: a number without a source of its own is cores x 2 x boost clock x that.
"""

import re
from dataclasses import dataclass, replace

from fitune.errors import UsageError, nearest

BF16_CAPABILITY = 8.0
"Compute capability from which on a GPU multiplies bf16: Ampere."


@dataclass(frozen=True)
class GpuModel:
    """Peak rates of one GPU, as its data sheet states them."""

    name: str
    "As it appears in nvidia-smi's name."
    capability: float
    "Compute capability: from 8.9 on it multiplies fp8 at twice the rate of bf16."
    bf16_tflops: float
    "Dense tensor-core products with float32 sums; 0 where there are none."
    memory_gb_s: float
    host_link_gb_s: float
    "Per direction: PCI Express 4 x16 carries 32, 5 x16 carries 64."
    peer_link_gb_s: float
    "To another GPU of the machine, per direction: NVLink, or half the host link where traffic goes through host RAM."
    source: str
    memory_gib: tuple[float, ...] = ()
    "What it is sold with."
    unified: bool = False
    "Its memory is the machine's RAM."
    is_known: bool = True
    "False: another model's rates stand in to choose by, but no time is told."

    @property
    def has_bf16(self) -> bool:
        return self.capability >= BF16_CAPABILITY

    @property
    def has_nvlink(self) -> bool:
        return self.peer_link_gb_s > self.host_link_gb_s / 2


_AMPERE = "NVIDIA GA102 architecture paper, appendix A"
_AMPERE_CLOCK = "GeForce RTX 30 specifications: cores x boost clock"
_ADA = "NVIDIA Ada architecture paper, appendix A"
_ADA_CLOCK = "GeForce RTX 40 specifications: cores x boost clock"
_BLACKWELL = "NVIDIA RTX Blackwell architecture paper"
_BLACKWELL_CLOCK = "GeForce RTX 50 specifications: cores x boost clock"
_LAPTOP = "GeForce laptop specifications: cores x boost clock at the highest power"
_RTX_LAPTOP = "NVIDIA RTX laptop specifications: cores x boost clock at the highest power"
_TURING = "NVIDIA Turing architecture paper: no bf16"


def _card(name, capability, tflops, memory_gb_s, memory_gib, source, link=32, peer=None, **more) -> GpuModel:
    memory = memory_gib if isinstance(memory_gib, tuple) else (memory_gib,)
    peer = link / 2 if peer is None else peer
    return GpuModel(name, capability, tflops, memory_gb_s, link, peer, source, memory, **more)


GPU_MODELS = [
    # servers
    _card("GB300", 10.3, 2500, 8000, 279, "NVIDIA GB300 NVL72 data sheet, per GPU", 450, 900),
    _card("B300", 10.3, 2250, 8000, 268, "NVIDIA DGX B300 data sheet, per GPU", 64, 900),
    _card("GB200", 10.0, 2500, 8000, 186, "NVIDIA GB200 NVL72 data sheet, per GPU", 450, 900),
    _card("B200", 10.0, 2250, 8000, 179, "NVIDIA DGX B200 data sheet, per GPU", 64, 900),
    _card("GH200", 9.0, 989, 4000, (94.5, 141), "NVIDIA GH200 data sheet", 450, 450),
    _card("H200 NVL", 9.0, 835, 4800, 140, "NVIDIA H200 data sheet (NVL)", 64, 450),
    _card("H200", 9.0, 989, 4800, 140, "NVIDIA H200 data sheet (SXM)", 64, 450),
    _card("H100 NVL", 9.0, 835, 3938, 93.6, "NVIDIA H100 data sheet (NVL)", 64, 300),
    _card("H100 PCIe", 9.0, 756, 2000, 79.6, "NVIDIA H100 data sheet (PCIe)", 64),
    _card("H100", 9.0, 989, 3350, 79.6, "NVIDIA H100 data sheet (SXM)", 64, 450),
    _card("H800 PCIe", 9.0, 756, 2000, 79.6, "NVIDIA H800 PCIe: the H100 PCIe", 64),
    _card("H800", 9.0, 989, 3350, 79.6, "NVIDIA H800: an H100 with NVLink of 400 GB/s", 64, 200),
    _card("H20", 9.0, 148, 4000, 95.6, "NVIDIA H20 data sheet", 64, 450),
    _card("A100 80GB PCIe", 8.0, 312, 1935, 80, "NVIDIA A100 data sheet (PCIe, 80 GB)"),
    _card("A100-SXM4-40GB", 8.0, 312, 1555, 40, "NVIDIA A100 data sheet (SXM, 40 GB)", 32, 300),
    _card("A100-PCIE", 8.0, 312, 1555, (40, 80), "NVIDIA A100 data sheet (PCIe)"),
    _card("A100", 8.0, 312, 2039, (40, 80), "NVIDIA A100 data sheet (SXM, 80 GB)", 32, 300),
    _card("A800 80GB PCIe", 8.0, 312, 1935, 80, "NVIDIA A800: the A100 80GB PCIe"),
    _card("A800", 8.0, 312, 2039, 80, "NVIDIA A800: an A100 with NVLink of 400 GB/s", 32, 200),
    _card("A30", 8.0, 165, 933, 24, "NVIDIA A30 data sheet"),
    _card("L40S", 8.9, 362, 864, 44.98, "NVIDIA L40S data sheet"),
    _card("L40", 8.9, 181, 864, 44.98, "NVIDIA L40 data sheet"),
    _card("L20", 8.9, 119, 864, 44.98, "NVIDIA L20 specifications: cores x boost clock, at the rate of the L40"),
    _card("L4", 8.9, 121, 300, 22.5, "NVIDIA L4 data sheet", 16),
    _card("A40", 8.6, 150, 696, 44.98, "NVIDIA A40 data sheet"),
    _card("A10", 8.6, 125, 600, 22.5, "NVIDIA A10 data sheet"),
    _card("A2", 8.6, 18, 200, 15, "NVIDIA A2 data sheet", 16),
    _card("GB10", 12.1, 125, 273, 119, "NVIDIA DGX Spark data sheet: FP4 with sparsity / 8", 273, 12.5, unified=True),
    # workstations
    _card("RTX PRO 6000 Blackwell Max-Q", 12.0, 439, 1792, 95.6, "NVIDIA RTX PRO 6000 data sheet: AI TOPS / 8", 64),
    _card("RTX PRO 6000", 12.0, 500, 1792, 95.6, "NVIDIA RTX PRO 6000 data sheet", 64),
    _card("RTX PRO 5000", 12.0, 258, 1344, (48, 72), "NVIDIA RTX PRO 5000 data sheet: AI TOPS / 8", 64),
    _card("RTX PRO 4500", 12.0, 219, 896, 32, "NVIDIA RTX PRO 4500 specifications: cores x boost clock", 64),
    _card("RTX PRO 4000", 12.0, 187, 672, 24, "NVIDIA RTX PRO 4000 specifications: cores x boost clock", 64),
    _card("RTX PRO 2000", 12.0, 68, 288, 16, "NVIDIA RTX PRO 2000 specifications: cores x boost clock", 32),
    _card("RTX 5000 Ada Generation Laptop", 8.9, 165, 576, 16, _RTX_LAPTOP),
    _card("RTX 4000 Ada Generation Laptop", 8.9, 134, 432, 12, _RTX_LAPTOP),
    _card("RTX 6000 Ada", 8.9, 364, 960, 48, "NVIDIA RTX 6000 Ada data sheet"),
    _card("RTX 5880 Ada", 8.9, 277, 960, 48, "NVIDIA RTX 5880 Ada data sheet: fp8 with sparsity / 4"),
    _card("RTX 5000 Ada", 8.9, 261, 576, 32, "NVIDIA RTX 5000 Ada data sheet: fp8 with sparsity / 4"),
    _card("RTX 4500 Ada", 8.9, 158, 432, 24, "NVIDIA RTX 4500 Ada data sheet: fp8 with sparsity / 4"),
    _card("RTX 4000 SFF Ada", 8.9, 77, 280, 20, "NVIDIA RTX 4000 SFF Ada data sheet: fp8 with sparsity / 4"),
    _card("RTX 4000 Ada", 8.9, 82, 360, 20, "NVIDIA RTX 4000 Ada data sheet: fp8 with sparsity / 4"),
    _card("RTX 2000 Ada", 8.9, 48, 224, 16, "NVIDIA RTX 2000 Ada data sheet: fp8 with sparsity / 4", 16),
    _card("A4000 Laptop", 8.6, 69, 384, 8, _RTX_LAPTOP),
    _card("A6000", 8.6, 155, 768, 48, "NVIDIA RTX A6000 data sheet"),
    _card("A5500", 8.6, 136, 768, 24, "NVIDIA RTX A5500 data sheet: with sparsity / 2"),
    _card("A5000", 8.6, 111, 768, 24, "NVIDIA RTX A5000 data sheet: with sparsity / 2"),
    _card("A4500", 8.6, 95, 640, 20, "NVIDIA RTX A4500 data sheet: with sparsity / 2"),
    _card("A4000", 8.6, 77, 448, 16, "NVIDIA RTX A4000 data sheet: with sparsity / 2"),
    _card("A2000", 8.6, 32, 288, (6, 12), "NVIDIA RTX A2000 data sheet: with sparsity / 2"),
    # GeForce RTX 50
    _card("RTX 5090 Laptop", 12.0, 91, 896, 24, _LAPTOP, 64),
    _card("RTX 5080 Laptop", 12.0, 70, 896, 16, _LAPTOP, 64),
    _card("RTX 5070 Ti Laptop", 12.0, 52, 672, 12, _LAPTOP, 64),
    _card("RTX 5070 Laptop", 12.0, 43, 384, 8, _LAPTOP, 32),
    _card("RTX 5060 Laptop", 12.0, 33, 384, 8, _LAPTOP, 32),
    _card("RTX 5050 Laptop", 12.0, 26, 384, 8, _LAPTOP, 32),
    _card("RTX 5090 D", 12.0, 148, 1792, 32, "GeForce RTX 5090 D specifications: the RTX 5090 by AI TOPS", 64),
    _card("RTX 5090", 12.0, 209, 1792, 32, _BLACKWELL, 64),
    _card("RTX 5080", 12.0, 113, 960, 16, _BLACKWELL, 64),
    _card("RTX 5070 Ti", 12.0, 88, 896, 16, _BLACKWELL, 64),
    _card("RTX 5070", 12.0, 62, 672, 12, _BLACKWELL, 64),
    _card("RTX 5060 Ti", 12.0, 47, 448, (8, 16), _BLACKWELL_CLOCK, 32),
    _card("RTX 5060", 12.0, 38, 448, 8, _BLACKWELL_CLOCK, 32),
    _card("RTX 5050", 12.0, 26, 320, 8, _BLACKWELL_CLOCK, 32),
    # GeForce RTX 40
    _card("RTX 4090 Laptop", 8.9, 79, 576, 16, _LAPTOP),
    _card("RTX 4080 Laptop", 8.9, 68, 432, 12, _LAPTOP),
    _card("RTX 4070 Laptop", 8.9, 40, 256, 8, _LAPTOP, 16),
    _card("RTX 4060 Laptop", 8.9, 29, 256, 8, _LAPTOP, 16),
    _card("RTX 4050 Laptop", 8.9, 24, 192, 6, _LAPTOP, 16),
    _card("RTX 4090 D", 8.9, 147, 1008, 24, _ADA_CLOCK),
    _card("RTX 4090", 8.9, 165, 1008, 24, _ADA),
    _card("RTX 4080 SUPER", 8.9, 104, 736, 16, _ADA_CLOCK),
    _card("RTX 4080", 8.9, 97, 717, 16, _ADA),
    _card("RTX 4070 Ti SUPER", 8.9, 88, 672, 16, _ADA_CLOCK),
    _card("RTX 4070 Ti", 8.9, 80, 504, 12, _ADA_CLOCK),
    _card("RTX 4070 SUPER", 8.9, 71, 504, 12, _ADA_CLOCK),
    _card("RTX 4070", 8.9, 58, 504, 12, _ADA_CLOCK),
    _card("RTX 4060 Ti", 8.9, 44, 288, (8, 16), _ADA_CLOCK, 16),
    _card("RTX 4060", 8.9, 30, 272, 8, _ADA_CLOCK, 16),
    # GeForce RTX 30
    _card("RTX 3080 Ti Laptop", 8.6, 47, 512, 16, _LAPTOP),
    _card("RTX 3080 Laptop", 8.6, 42, 448, (8, 16), _LAPTOP),
    _card("RTX 3070 Ti Laptop", 8.6, 35, 448, 8, _LAPTOP),
    _card("RTX 3070 Laptop", 8.6, 33, 448, 8, _LAPTOP),
    _card("RTX 3060 Laptop", 8.6, 26, 336, 6, _LAPTOP),
    _card("RTX 3050 Ti Laptop", 8.6, 17, 192, 4, _LAPTOP, 16),
    _card("RTX 3050 Laptop", 8.6, 14, 192, (4, 6), _LAPTOP, 16),
    _card("RTX 3090 Ti", 8.6, 80, 1008, 24, _AMPERE_CLOCK),
    _card("RTX 3090", 8.6, 71, 936, 24, _AMPERE),
    _card("RTX 3080 Ti", 8.6, 68, 912, 12, _AMPERE_CLOCK),
    _card("RTX 3080", 8.6, 60, 760, (10, 12), _AMPERE),
    _card("RTX 3070 Ti", 8.6, 43, 608, 8, _AMPERE_CLOCK),
    _card("RTX 3070", 8.6, 41, 448, 8, _AMPERE),
    _card("RTX 3060 Ti", 8.6, 32, 448, 8, _AMPERE_CLOCK),
    _card("RTX 3060", 8.6, 25, 360, (8, 12), "NVIDIA GA102 architecture paper, scaled by SMs and clock"),
    _card("RTX 3050", 8.6, 18, 224, (6, 8), _AMPERE_CLOCK, 16),
    # without bf16, which fitune trains in
    _card("TITAN RTX", 7.5, 0, 672, 24, _TURING, 16),
    _card("RTX 2080 Ti", 7.5, 0, 616, 11, _TURING, 16),
    _card("RTX 2080 SUPER", 7.5, 0, 496, 8, _TURING, 16),
    _card("RTX 2080", 7.5, 0, 448, 8, _TURING, 16),
    _card("RTX 2070 SUPER", 7.5, 0, 448, 8, _TURING, 16),
    _card("RTX 2070", 7.5, 0, 448, 8, _TURING, 16),
    _card("RTX 2060 SUPER", 7.5, 0, 448, 8, _TURING, 16),
    _card("RTX 2060", 7.5, 0, 336, (6, 12), _TURING, 16),
    _card("Quadro RTX 8000", 7.5, 0, 672, 48, _TURING, 16),
    _card("Quadro RTX 6000", 7.5, 0, 672, 24, _TURING, 16),
    _card("Quadro RTX 5000", 7.5, 0, 448, 16, _TURING, 16),
    _card("T4", 7.5, 0, 320, 15, _TURING, 16),
    _card("V100", 7.0, 0, 900, (16, 32), "NVIDIA V100 data sheet: no bf16", 16),
    _card("P100", 6.0, 0, 732, 16, "NVIDIA P100 data sheet: no bf16", 16),
]  # fmt: skip
"""More specific names before their beginnings."""

VARIANTS = {"ti", "super", "d", "laptop"}
"""Words that make a card another one: an RTX 5080 SUPER is no RTX 5080, also where the table has only the latter."""

TYPICAL_BY_MEMORY_GIB = [
    (14, "RTX 3060"), (30, "RTX 4090"), (34, "RTX 5090"), (44, "A100"), (60, "A6000"), (90, "H100"),
]  # fmt: skip
"""The model assumed for a profile that says only how much memory its GPUs have, up to so many GiB."""


def gpu_model(name: str) -> GpuModel:
    """The table's entry for a GPU by name, as nvidia-smi spells it or shorter. Raises UsageError."""
    found = look_up(name)
    if found is None:
        names = [model.name for model in GPU_MODELS]
        raise UsageError(
            f"GPU model '{name}' is not in the table (state what it can do with --gpu-memory GIB and --gpu-tflops N, "
            f"dense bf16 by its data sheet){nearest(name, names)}"
        )
    return found


def lack_of_bf16(name: str, model: GpuModel) -> str:
    """What a GPU called `name` cannot do, which fitune needs."""
    return (
        f"{name} has compute capability {model.capability:.1f} and no bf16, in which fitune trains (8.0 and later: "
        f"RTX 30, A10, A100, L4 and newer)"
    )


def refuse_missing_bf16(model: GpuModel) -> None:
    """Raises UsageError for a model that has no products to time."""
    if not model.bf16_tflops:
        raise UsageError(f"{lack_of_bf16(model.name, model)}; use a newer GPU")


def refuse_several(name: str) -> None:
    """Raises UsageError for a list of GPUs, or a number of them, where --gpu takes one model's name."""
    if "," in name:
        raise UsageError(
            f"--gpu takes one model, given is '{name}'; of uneven GPUs name the slowest, and give the memory of the "
            "smallest with --gpu-memory GIB, their number with --gpus N"
        )
    if counted := re.fullmatch(r"\s*(\d+)\s*x\s+(.+)|(.+?)\s+x\s*(\d+)\s*", name):
        count, model = counted[1] or counted[4], counted[2] or counted[3]
        raise UsageError(f"--gpu takes one model, given is '{name}'; use --gpu '{model}' --gpus {count}")


def memory_of(name: str) -> float:
    """GiB of a model's cards. Raises UsageError if it is sold with several sizes and `name` has none of them."""
    model = gpu_model(name)
    if len(model.memory_gib) == 1:
        return model.memory_gib[0]
    named = [gib for gib in model.memory_gib if re.search(rf"\b{gib:g} ?g(i?b)?\b", name.lower())]
    if len(named) == 1:
        return named[0]
    sizes = " or ".join(f"{gib:g}" for gib in model.memory_gib)
    raise UsageError(f"{model.name} is sold with {sizes} GiB: add --gpu-memory GIB")


def stated_model(name: str | None, memory_gib: float, tflops: float) -> GpuModel:
    """A GPU that the table need not have, by its stated products; its links and memory are those of its like."""
    alike = look_up(name or "") or likely_model(memory_gib)
    scale = max(1.0, tflops / alike.bf16_tflops) if alike.bf16_tflops else 1.0
    return replace(
        alike, name=name or f"a GPU of {tflops:g} TFLOP/s", bf16_tflops=tflops, capability=max(alike.capability, 8.0),
        memory_gb_s=alike.memory_gb_s * scale, source="stated with --gpu-tflops",
    )  # fmt: skip


def likely_model(memory_gib: float, name: str | None = None) -> GpuModel:
    """The entry for a GPU found here, or the typical model with so much memory.

    A name that is not in the table gets the typical model's rates to choose by, and no time is told.
    """
    if name and (found := look_up(name)):
        return found
    typical = next((typical for limit, typical in TYPICAL_BY_MEMORY_GIB if memory_gib <= limit), "H200")
    model = gpu_model(typical)
    return replace(model, name=name, source="not in the table", is_known=False) if name else model


def look_up(name: str) -> GpuModel | None:
    """The table's entry whose name is in `name`."""
    words = re.sub(r"\brtx(?=\d)", "rtx ", name.lower().replace("-", " "))
    return next((model for model in GPU_MODELS if _is_named(model, words)), None)


def _is_named(model: GpuModel, words: str) -> bool:
    """Whether a GPU's name has the model's in it, and no further word that makes it another card."""
    own = model.name.lower().replace("-", " ")
    alike = VARIANTS & set(own.split()) == VARIANTS & set(words.split())
    return alike and re.search(rf"\b{own}g?\b", words) is not None
