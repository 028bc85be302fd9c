"""In what decoder layers' linears are multiplied: what `compute: auto` takes, and which GPUs can do what is asked."""

from fitune.config.schema import AUTO, Run
from fitune.errors import UsageError
from fitune.planning.gpu_models import GpuModel, likely_model

FP8_CAPABILITY = 8.9
AUTO_TAKES_FP8 = False
"""Whether `auto` takes fp8 where the GPU has it. Adapters trained so lay 0.6 and 1.0 % of the held-out loss from those
trained in bf16, where 0.5 % were allowed: docs/fp8.md."""


def has_fp8(gpu: GpuModel) -> bool:
    return gpu.capability >= FP8_CAPABILITY


def settled(run: Run, gpu: GpuModel | None) -> Run:
    """The run with bf16 or fp8 where its profile says auto. None: the GPU is not known, as on a CPU."""
    if run.profile.compute != AUTO:
        return run
    takes_fp8 = AUTO_TAKES_FP8 and run.recipe.method != "full" and gpu is not None and has_fp8(gpu)
    profile = run.profile.model_copy(update={"compute": "fp8" if takes_fp8 else "bf16"})
    return run.model_copy(update={"profile": profile})


def refuse_missing_fp8(run: Run, gpu: GpuModel | None, card_gib: float | None = None) -> None:
    """Raises UsageError if the run asks for fp8 of a GPU without it.

    None: the one that is typical for a card of `card_gib`, or of what the profile states, which may be a part of one.
    """
    if run.profile.compute != "fp8" or run.accelerate.use_cpu:
        return
    if gpu:
        refuse_fp8_on(gpu)
        return
    gib = card_gib or run.profile.gpu_memory_gib or 0
    refuse_fp8_on(likely_model(gib), f", taken for a card of {gib:g} GiB,", "name yours with --gpu, or use")


def refuse_fp8_on(gpu: GpuModel, assumed: str = "", instead: str = "use") -> None:
    """Raises UsageError for a GPU without fp8."""
    if not has_fp8(gpu):
        raise UsageError(f"{lack_of_fp8(gpu, assumed)}; {instead} --set profile.compute=bf16")


def lack_of_fp8(gpu: GpuModel, assumed: str = "") -> str:
    """What a GPU without fp8 lacks, in words."""
    needed = f"profile.compute fp8 needs compute capability {FP8_CAPABILITY}"
    return f"{needed}, {gpu.name}{assumed} has {gpu.capability:.1f}"
