"""A machine that trains: its GPUs, what each can do here, its RAM; and what of uneven GPUs counts."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from fitune.errors import UsageError
from fitune.planning.gpu_models import BF16_CAPABILITY, GpuModel, lack_of_bf16, likely_model, look_up

UNEVEN = 1.2
"GPUs that differ by less count as alike."
IDENTITIES = ("GPU-", "MIG-")
"What a UUID begins with."
MOSTLY_FREE = 0.9
"A driver and a screen take less than the rest of a GPU's memory."
TINY = 1e-3
"Less is none: of a GPU that others have filled."


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
    "Of a whole GPU's cores: below 1 for a part of a GPU that was divided (MIG)."
    identity: str = ""
    "UUID."
    shown_as: str = ""
    "In CUDA_VISIBLE_DEVICES."
    number: int | None = None
    "As nvidia-smi counts; of a part of a GPU that of the whole one."

    @property
    def in_words(self) -> str:
        """What it is called in a shop, its memory, and what keeps it from being as fast as another one of its name."""
        model, gigabytes = look_up(self.name), f"{self.total_gib:.0f} GB"
        words = [model.name if model else self.name.removeprefix("NVIDIA ")]
        if gigabytes.replace(" ", "") not in words[0].replace(" ", ""):
            words.append(gigabytes)
        if self.free_gib < MOSTLY_FREE * self.total_gib:
            words.append(f"{self.free_gib:.1f} GiB free")
        if model and self.link_gb_s and self.link_gb_s < model.host_link_gb_s and not self.unified:
            words.append(f"on a link of {self.link_gb_s:g} GB/s")
        return ", ".join(words)

    def is_called(self, name: str) -> bool:
        """Whether CUDA takes `name` for it: its number, or its UUID, which may be cut short."""
        is_short = name.startswith(IDENTITIES) and self.identity.startswith(name)
        return is_short or name in (self.shown_as, self.identity)

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
    missing: str = ""
    "The GPU that CUDA_VISIBLE_DEVICES names and that is not there, in one line."

    @property
    def gpu_memory_gib(self) -> float:
        """Free memory of the fullest GPU: every rank needs as much."""
        return min((gpu.free_gib for gpu in self.gpus), default=0.0)

    @property
    def card_gib(self) -> float:
        """All memory of the smallest GPU, which others may use: what cards are sold by. 0 without one."""
        return min((gpu.total_gib for gpu in self.gpus), default=0.0)

    @property
    def unified(self) -> bool:
        """GPU and RAM are one memory: what one takes the other lacks."""
        return any(gpu.unified for gpu in self.gpus)

    @property
    def model(self) -> GpuModel | None:
        """What its GPUs can do together: at each step they wait for the slowest, at each link. None without one."""
        return _slowest([gpu.model for gpu in self.gpus])

    @property
    def known_model(self) -> GpuModel | None:
        """The same; None also where the table does not have one of them."""
        models = [gpu.known_model for gpu in self.gpus]
        return None if None in models else _slowest(models)

    @property
    def uneven(self) -> str | None:
        """What its GPUs hold each other back by, in one line; None where they are alike."""
        for said, measure in MEASURES.items():
            sizes = [measure(gpu) for gpu in self.gpus]
            if len(_steps(sizes)) > 1:
                return said.format(", ".join(f"{size:.3g}" for size in sizes))
        return None

    @property
    def with_bf16(self) -> "Machine":
        """The GPUs that can train."""
        return self._with_at_least(BF16_CAPABILITY, lambda gpu: gpu.model.capability)

    def first(self, count: int) -> "Machine":
        """The GPUs that `count` ranks take."""
        return replace(self, gpus=self.gpus[:count])

    def emptiest(self, count: int) -> "Machine":
        """The `count` GPUs with most free memory; of equal ones the first."""
        return replace(self, gpus=tuple(sorted(self.gpus, key=lambda gpu: -gpu.free_gib)[:count]))

    def at_most(self, gpu_gib: float | None, host_gib: float | None) -> "Machine":
        """With no more free memory on a GPU, or RAM, than given; None, or what is no number above 0, leaves it."""
        gpu, host = (gib if type(gib) in (int, float) and gib > 0 else math.inf for gib in (gpu_gib, host_gib))
        gpus = tuple(replace(one, free_gib=min(one.free_gib, gpu)) for one in self.gpus)
        return replace(self, gpus=gpus, host_available_gib=min(self.host_available_gib, host))

    def shown_by(self, gpu_ids: str | None) -> "Machine":
        """What ranks see that are started with an accelerate config's `gpu_ids`; None: all.

        One that is not here, or that CUDA_VISIBLE_DEVICES hides, is `missing`.
        """
        if gpu_ids is None:
            return self
        ids = [name.strip() for name in gpu_ids.split(",")]
        found = [next((gpu for gpu in self.gpus if gpu.is_called(name)), None) for name in ids]
        shown = tuple(gpu for gpu in found if gpu)
        absent = [name for name, gpu in zip(ids, found, strict=True) if gpu is None]
        there = ", ".join(gpu.shown_as for gpu in self.gpus)
        missing = f"gpu_ids {gpu_ids}: GPU {absent[0]} is not here, or hidden; there are: {there}" if absent else ""
        return replace(self, gpus=shown, missing=self.missing or missing)

    @property
    def gpu_ids(self) -> str:
        """For an accelerate config: by UUID, which means the same in any order and beside any CUDA_VISIBLE_DEVICES."""
        return ",".join(gpu.identity or gpu.shown_as for gpu in self.gpus)

    @property
    def in_variable(self) -> str:
        """As CUDA is told to show these GPUs alone."""
        return "CUDA_VISIBLE_DEVICES=" + ",".join(gpu.shown_as or str(n) for n, gpu in enumerate(self.gpus))

    def parts(self) -> Iterator["Machine"]:
        """Itself, then without GPUs that hold the others back: those with clearly more of one measure or of several."""
        yield self
        seen = {self.gpus, ()}
        for least in product(*(_steps([measure(gpu) for gpu in self.gpus]) for measure in MEASURES.values())):
            part = self
            for size, measure in zip(least, MEASURES.values(), strict=True):
                part = part._with_at_least(size, measure)
            if part.gpus not in seen:
                seen.add(part.gpus)
                yield part

    def _with_at_least(self, size: float, measure: Callable[[Gpu], float]) -> "Machine":
        return replace(self, gpus=tuple(gpu for gpu in self.gpus if measure(gpu) >= size))

    def refuse_missing_gpus(self) -> None:
        """Raises UsageError if CUDA_VISIBLE_DEVICES names a GPU that is not there: fewer would train than meant."""
        if self.missing:
            raise UsageError(self.missing)

    def refuse_missing_bf16(self, ranks: int | None = None) -> None:
        """Raises UsageError if one of the GPUs that `ranks` take, None: all, cannot compute in bf16."""
        lacking = [gpu for gpu in self.gpus[:ranks] if not gpu.model.has_bf16]
        if not lacking:
            return
        others = self.with_bf16
        instead = f"leave it out: {others.in_variable}" if others.gpus else "use a newer GPU"
        raise UsageError(f"{lack_of_bf16(lacking[0].name, lacking[0].model)}; {instead}")


MEASURES = {
    "the GPUs have {} GiB free: the smallest counts for all": lambda gpu: gpu.free_gib,
    "the GPUs do {} TFLOP/s: all wait for the slowest": lambda gpu: gpu.model.bf16_tflops,
    "the GPUs have links of {} GB/s: all wait for the slowest": lambda gpu: gpu.model.host_link_gb_s,
}
"What GPUs hold the others back by, and how that is said."


def _steps(sizes: list[float]) -> list[float]:
    """Sizes that are clearly different, the smallest first."""
    steps = []
    for size in sorted(sizes):
        if not steps or size >= max(UNEVEN * steps[-1], TINY):
            steps.append(size)
    return steps


def _slowest(models: list[GpuModel]) -> GpuModel | None:
    """The model with the slowest products, its other rates those of the slowest too."""
    if not models:
        return None
    slowest = min(models, key=lambda model: model.bf16_tflops)
    rates = ("memory_gb_s", "host_link_gb_s", "peer_link_gb_s", "capability")
    return replace(slowest, **{rate: min(getattr(model, rate) for model in models) for rate in rates})
