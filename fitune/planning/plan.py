"""`fitune plan`: what a run needs, whether it fits, how long it takes. No torch, no GPU, nothing is loaded."""

import math
from dataclasses import dataclass, replace

from fitune.config.adapted_linears import adapted_linears
from fitune.config.base_model import refuse_length_beyond
from fitune.config.model_shapes import ModelShape, find_shape, has_weights
from fitune.config.optimizers import numbers_per_weight, takes_bf16_gradients
from fitune.config.recipe import Recipe
from fitune.config.schema import Run
from fitune.planning.gpu_models import GpuModel, likely_model
from fitune.planning.limits import Limits
from fitune.planning.machine import Gpu
from fitune.planning.memory import GpuPeak, disk, gpu_peak, host_moments, host_peak
from fitune.planning.run_length import kept_checkpoints, steps_of
from fitune.planning.sizes import BF16, EIGHT_BIT_STATE, FP32, GIB, Setup
from fitune.planning.step_time import step_seconds

GPU_COUNT, GPU_MEMORY, ONE_MEMORY = "GPUs", "GPU memory", "memory of CPU and GPU"
ERROR = 0.05
"Of a predicted GPU peak, at most: what the tests allow against measured runs."
HOST_ERROR = 0.10
"Of predicted host RAM, at most: likewise."
TIME_ERROR = 0.15
"Of a predicted step, at most: likewise."


@dataclass(frozen=True)
class Verdict:
    resource: str
    needs: float
    has: float

    @property
    def fits(self) -> bool:
        return self.needs <= self.has

    def __str__(self) -> str:
        return f"{self.resource}: {self.in_words}"

    @property
    def in_words(self) -> str:
        """Without the resource. Rounded so that a no never looks like a yes."""
        if self.resource == GPU_COUNT:
            return f"needs {self.needs:.0f}, has {self.has:.0f}"
        if math.isinf(self.has):
            return f"needs {self.needs:.1f} GiB"
        digits = next(n for n in range(1, 9) if n == 8 or (round(self.needs, n) <= round(self.has, n)) == self.fits)
        needs, has = round(self.needs, digits), round(self.has, digits)
        text, difference = f"needs {needs:.{digits}f} GiB of {has:.{digits}f}", abs(has - needs)
        if not self.fits:
            return f"{text}, {difference:.{digits}f} too little"
        tight = self.resource in (GPU_MEMORY, ONE_MEMORY) and self.has - self.needs < ERROR * self.needs
        return f"{text}, {difference:.{digits}f} to spare" + (", less than the prediction may be off" if tight else "")


@dataclass(frozen=True)
class Time:
    """The roofline's estimate."""

    parts: dict[str, float]
    "Seconds of one optimizer step."
    tokens_per_second: float
    steps: int | None = None
    price_per_hour: float | None = None
    gpu: str = ""
    is_known: bool = True
    "False: of a GPU that is not in the table, by another one's rates. To compare by, not to tell."

    @property
    def hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.parts["total"] / 3600

    @property
    def cost(self) -> float | None:
        """Of the run."""
        return None if self.hours is None or self.price_per_hour is None else self.hours * self.price_per_hour

    @property
    def cost_per_million_tokens(self) -> float | None:
        if self.price_per_hour is None:
            return None
        return self.price_per_hour * 1e6 / (3600 * self.tokens_per_second)


@dataclass(frozen=True)
class Plan:
    run: Run
    setup: Setup
    limits: Limits
    gpu: GpuPeak | None
    "None on the CPU."
    host: dict[str, dict[str, float]]
    "Phase -> bytes by purpose."
    disk: dict[str, float]
    "Bytes by purpose."
    verdicts: list[Verdict]
    time: Time | None
    cards: tuple[Gpu, ...] = ()
    "The GPUs among which it was searched for: its ranks take the first ones. None for a run that was not."

    @property
    def used_cards(self) -> tuple[Gpu, ...]:
        return self.cards[: self.setup.ranks // self.setup.machines]

    @property
    def fits(self) -> bool:
        return all(verdict.fits for verdict in self.verdicts)

    @property
    def host_phase(self) -> str:
        return max(self.host, key=lambda phase: sum(self.host[phase].values()))


def make_plan(run: Run, limits: Limits, gpu: GpuModel | None = None, **options) -> Plan:
    """Needs, verdicts and time of one run; what else would fit is for `fitune.planning.search` to find."""
    run = with_free_memory(run, limits)
    setup = setup_to_train(run)
    space = disk(setup, kept_checkpoints(run))
    if has_weights(run.recipe.base.model, run.recipe.base.revision):
        space["download"] = 0.0
    return Plan(
        run=run,
        setup=setup,
        limits=limits,
        gpu=gpu_peak(setup) if setup.on_gpu else None,
        host=host_moments(setup),
        disk=space,
        verdicts=verdicts(setup, limits, space),
        time=_time(run, setup, gpu, **options) if setup.on_gpu else None,
    )


def with_free_memory(run: Run, limits: Limits) -> Run:
    """The run with what `limits` have of a GPU, where its profile states more.

    Ranks decide by it: what is free differs from one to the next, and changes while they start.
    """
    stated = run.profile.gpu_memory_gib
    has_less = stated is not None and limits.gpu is not None and limits.gpu < stated
    return run.model_copy(update={"free_gpu_gib": limits.gpu if has_less else None})


def setup_to_train(run: Run, shape: ModelShape | None = None) -> Setup:
    """The same as `setup_of` with gradients of adapters that wait for a step's last micro batch, where there is room.

    Several ranks then reduce them once a step. There is as much room as the profile states, or as was free when the
    run was started; one that states no GPU memory, as for CPUs, has room.
    """
    setup = setup_of(run, shape)
    if setup.full or setup.shards == 1 or setup.accumulation == 1:
        return setup
    waiting, stated = replace(setup, adapters_wait=True), run.profile.gpu_memory_gib
    room = stated if run.free_gpu_gib is None else run.free_gpu_gib
    has_room = room is None or gpu_peak(waiting).total / GIB * (1 + ERROR) <= room
    return waiting if has_room else setup


def setup_of(run: Run, shape: ModelShape | None = None) -> Setup:
    """The numbers that decide about memory, from a resolved run; `shape` is by default its base's.

    Raises UsageError for what the model cannot do.
    """
    recipe, profile, accelerate = run.recipe, run.profile, run.accelerate
    shape = shape or find_shape(recipe.base.model, recipe.base.revision)
    refuse_length_beyond(shape.max_positions, recipe, recipe.base.model)
    small_states = profile.optimizer_state == "bf16_8bit"
    return Setup(
        shape=shape,
        method=recipe.method,
        ranks=accelerate.num_processes,
        machines=accelerate.num_machines,
        micro_batch=profile.micro_batch,
        max_length=recipe.max_length,
        accumulation=run.gradient_accumulation_steps,
        compute=BF16 if accelerate.mixed_precision == "bf16" else FP32,
        optimizer_state=EIGHT_BIT_STATE if small_states else FP32 * numbers_per_weight(recipe.training),
        small_states=small_states,
        optimizer_offload=profile.optimizer_offload,
        **_lora(recipe, shape.layers),
        offload=accelerate.offload_params,
        streams_adamw=run.streams_adamw,
        takes_bf16_gradients=not small_states and takes_bf16_gradients(recipe.training),
        embedding_offload=profile.embedding_offload,
        kept_layers=min(profile.kept_layers, shape.layers),
        kept_attention=profile.keeps_attention,
        activation_offload=profile.moves_activations,
        fp8=profile.compute == "fp8",
        reshard=not accelerate.keeps_gathered,
        on_gpu=not accelerate.use_cpu,
        replicas=run.replicas,
        saves=recipe.training.get("save_strategy") != "no",
        async_save=profile.saves_async,
        reduce_in_bf16=profile.reduce_dtype == "bf16",
    )


def _lora(recipe: Recipe, layers: int) -> dict:
    if recipe.lora is None:
        return {}
    return {
        "lora_r": recipe.lora.r,
        "lora_targets": adapted_linears(recipe.lora, layers),
        "lora_dropout": recipe.lora.dropout > 0,
        "trained_tokens": len(recipe.lora.trainable_tokens),
    }


def verdicts(setup: Setup, limits: Limits, space: dict[str, float] | None = None) -> list[Verdict]:
    """One per resource that is limited."""
    found = []
    if setup.on_gpu:
        if setup.ranks / setup.machines > limits.gpus:
            found.append(Verdict(GPU_COUNT, setup.ranks // setup.machines, limits.gpus))
        if limits.gpu is not None and limits.gpus and not limits.unified:
            found.append(Verdict(GPU_MEMORY, gpu_peak(setup).total / GIB, limits.gpu))
    if limits.unified and setup.on_gpu:
        gpus = setup.ranks / setup.machines * gpu_peak(setup).total
        found.append(Verdict(ONE_MEMORY, (gpus + host_peak(setup)) / GIB, limits.host))
    else:
        found.append(Verdict("host RAM", host_peak(setup) / GIB, limits.host))
    if limits.disk is not None and space:
        found.append(Verdict("disk for the run", (space["checkpoints"] + space["result"]) / GIB, limits.disk))
    if limits.download_disk is not None and space:
        found.append(Verdict("disk for the download", space["download"] / GIB, limits.download_disk))
    return found


def needed_disk(space: dict[str, float]) -> float:
    """Of training itself: no optional copy, no merge."""
    return sum(space[name] for name in ("download", "checkpoints", "result"))


def _time(run: Run, setup: Setup, gpu: GpuModel | None, *, price: float | None = None, network: float | None = None):
    gpu = gpu or likely_model(run.profile.gpu_memory_gib or 0)
    parts = step_seconds(setup, gpu, network)
    tokens = run.recipe.global_batch_size * setup.max_length  # filler rows count nothing
    return Time(parts, tokens / parts["total"], steps_of(run), price, gpu.name, gpu.is_known)
