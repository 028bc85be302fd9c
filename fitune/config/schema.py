"""WHERE a recipe is trained and HOW processes start, each knob once with its meaning, unit and limits; and the run.

WHAT is learned is in `fitune.config.recipe`.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from fitune.config.fields import Flag, Method, PositiveFloat, PositiveInt, Size, Strict
from fitune.config.model_sizes import checked_size
from fitune.config.optimizers import is_adamw
from fitune.config.recipe import Recipe

AUTO = "auto"
"A profile's value that `plan` chooses."
SMALLEST = {"micro_batch": 1, "kept_layers": 0}
"The keys that a profile may leave to `plan`, with the value that takes least memory."
Rows = PositiveInt | Literal["auto"]
ModelSize = Annotated[str, AfterValidator(checked_size)]
ADAPTER = "adapter"
"The folder of a trained adapter, in a run and in its checkpoints."


class Expectation(Strict):
    """Peak memory of one recipe under a profile."""

    peak_gpu_gib: PositiveFloat | None = None
    "Worst rank, CUDA context and NCCL included."
    peak_host_gib: PositiveFloat | None = None
    "Whole machine."
    source: str
    "`measured DATE COMMIT`; benchmarks/tables.py writes it."


class Profile(Strict):
    """WHERE it fits. One file in recipes/memory_profiles/."""

    description: str
    "One line, which `list` prints."
    accelerate_config: str
    "Name of the file in accelerate_configs/ that starts the processes."
    num_gpus: Annotated[int, Field(ge=0)]
    "GPUs over all machines; 0 trains on the CPU."
    gpu_memory_gib: PositiveFloat | None = None
    "Memory of one GPU that a run may take."
    host_memory_gib: Size
    "RAM of one machine."
    fits: dict[ModelSize, list[Method]] = {"any": list(get_args(Method))}
    """Methods by the model's size, which its config.json says: `{70b: [qlora]}`. A size is a number of parameters, or
    `tiny`, or `any`: `fitune.config.model_sizes`.
    """
    micro_batch: Rows = AUTO
    "Rows per process and forward pass. `auto`: as below."
    kept_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = AUTO
    """Layers that keep their activations for the backward pass; the others keep their input and compute the rest again.
    More than the model has: all. `auto`, here and in `micro_batch`: what `plan` finds to give the shortest step in the
    GPU's memory.
    """
    kept_attention: Flag | Literal["auto"] = AUTO
    """Layers that are not kept keep attention's result beside their input and do not compute it again. That takes h
    values a token, and gains where examples are long. `auto`: where `plan` finds it faster, from examples of 8,192
    tokens on.
    """
    compute: Literal["auto", "bf16", "fp8"] = AUTO
    """In what the decoder layers' linears are multiplied in training: `fp8` needs a GPU of compute capability 8.9 or
    higher. Method lora then keeps their weights so, a byte each; full keeps and trains them as ever.
    `auto`: bf16, but where it was shown that fp8 learns as well (`fitune.planning.compute`). CPUs compute in float32,
    and emulate fp8.
    """
    optimizer_state: Literal["fp32", "bf16_8bit"] = "fp32"
    """What method full keeps for each weight. `fp32`: weight and the optimizer's moments in float32, 12 bytes, and the
    gradient: 4 bytes, or 2 where a step is one pass. `bf16_8bit`: weight and gradient in bf16, AdamW's moments in 8
    bits, 6 bytes.
    """
    optimizer_offload: Flag = False
    """Keep gradients and the optimizer's moments in host RAM, weights on the GPU: 4 of 6 bytes. They visit the GPU
    piece by piece. For `optimizer_state: bf16_8bit`.
    """
    activation_offload: Flag | Literal["auto"] = AUTO
    """Move what layers that are not kept do keep to host RAM until the backward pass needs it: their inputs, and
    attention's results with `kept_attention`. `auto`: where `plan` finds that steps are 5 % faster with it (15 % with
    method full), or that none fits without.
    """
    embedding_offload: Flag = False
    "Keep the frozen embedding and head, each needed once per pass, in host RAM."
    async_save: Flag | Literal["auto"] = AUTO
    """Copy each checkpoint to host RAM and write it while training goes on; else training waits for the disk.
    `auto`: where `plan` finds that host RAM has room for the copy.
    """
    replicas: PositiveInt | Literal["auto"] = AUTO
    """Copies of the model, each sharded over as many GPUs: weights travel inside a copy, between copies only gradients.
    1: all GPUs share one copy (FSDP); as many as GPUs: each holds the whole model (data parallel); between, such as one
    for each machine: hybrid sharding. `auto`: what `plan` finds fastest; for lora and qlora at least one on each of
    several machines, wherever that fits.
    """
    reduce_dtype: Literal["bf16", "fp32"] = "bf16"
    """In what method full's gradients, of bf16 products, travel and are added up between the GPUs that share a copy of
    the model: `bf16` as accelerate and TRL do, half the bytes of `fp32`. Passes of a step, copies of the model and
    adapters are added up in float32 anyway.
    """
    expected: dict[str, Expectation] = {}
    "Peak memory by recipe name."

    @model_validator(mode="after")
    def _gpu_memory_is_known(self):
        if self.num_gpus and self.gpu_memory_gib is None:
            raise ValueError("gpu_memory_gib is missing: a profile with GPUs says how much memory each has")
        return self

    @property
    def methods(self) -> set[str]:
        return {method for methods in self.fits.values() for method in methods}

    @property
    def keeps_attention(self) -> bool:
        """`auto`, in a run that `plan` has not filled, is a no."""
        return self.kept_attention is True

    @property
    def moves_activations(self) -> bool:
        """`auto`, in a run that `plan` has not filled, is a no."""
        return self.activation_offload is True

    @property
    def saves_async(self) -> bool:
        """`auto`, in a run that `plan` has not filled, or of an earlier version, is a no."""
        return self.async_save is True

    @property
    def left_to_plan(self) -> tuple[str, ...]:
        """The keys of SMALLEST that are `auto`."""
        return tuple(key for key in SMALLEST if getattr(self, key) == AUTO)


class AccelerateConfig(Strict):
    """HOW processes start: what fitune reads of a file in accelerate_configs/."""

    path: str
    "The file."
    num_processes: PositiveInt
    "Processes over all machines, one for each GPU."
    num_machines: PositiveInt = 1
    "Machines; `train --machine-rank` says which one this is."
    main_process_ip: str | None = None
    "Address of machine 0, where there are several."
    main_process_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    "A port on machine 0, the same on all machines; 0 takes any free one, where there is one machine."
    gpu_ids: str | None = None
    "The GPUs of this machine that processes see, as CUDA_VISIBLE_DEVICES names them, in quotes where it is one number."
    use_cpu: Flag = False
    "Train on the CPU. Only tiny models do that in reasonable time."
    mixed_precision: Literal["no", "bf16"] = "no"
    "What is computed in: `bf16` on GPUs, where `no` is refused."
    offload_params: Flag = False
    "Keep sharded weights in host RAM; a layer visits the GPU while it computes."
    reshard_after_forward: Flag | Literal["auto"] = AUTO
    """Free a layer's gathered weights after its forward pass. `false` keeps them for the backward pass, which else
    gathers them again; method full then keeps them to the end of the step. `auto`, which is no such line in the file:
    what `plan` finds to give the shortest step; `true` where nothing is gathered or cast, and with weights in host RAM.
    """

    @property
    def keeps_gathered(self) -> bool:
        """`auto`, in a run that `plan` has not filled, is a no."""
        return self.reshard_after_forward is False


class Run(Strict):
    """One resolved run: run.yaml. The recipe, the profile and the accelerate config it came from, and what follows."""

    fitune: str
    "Version that wrote the file."
    recipe_name: str
    profile_name: str
    output_dir: str
    working_folder: str | None = None
    "Where relative paths in it start, seen from the run's folder; unknown in runs of earlier versions."
    recipe: Recipe
    profile: Profile
    accelerate: AccelerateConfig
    gradient_accumulation_steps: PositiveInt
    "Derived: global batch / (micro batch x processes)."
    free_gpu_gib: Annotated[float, Field(ge=0)] | None = None
    "What was free of each GPU when the run was started, where that is less than its profile states."
    resume: Flag = False
    left_to_plan: tuple[str, ...] = Field(default=(), exclude=True)
    "Keys of the profile that are `auto`. They have their smallest value until `fitune.planning.fill` chooses one."
    checkpoint: str | None = Field(default=None, exclude=True)
    "Folder of the checkpoint that `eval` and `generate` take instead of the run's result; not part of run.yaml."

    @model_validator(mode="after")
    def _the_profile_has_numbers(self):
        for key in SMALLEST:
            if not isinstance(getattr(self.profile, key), int):
                raise ValueError(f"profile.{key}: a run has one number")
        return self

    @property
    def replicas(self) -> int:
        """Copies of the model. `auto`, in a run that `plan` has not filled, is one over all GPUs."""
        return 1 if self.profile.replicas == AUTO else self.profile.replicas

    @property
    def shards(self) -> int:
        """Ranks that hold one copy between them."""
        return self.accelerate.num_processes // self.replicas

    @property
    def reduces_in_bf16(self) -> bool:
        """Whether ranks that hold a copy between them add up gradients so. Several copies have float32 for both."""
        in_bf16 = self.recipe.method == "full" and self.accelerate.mixed_precision == "bf16"
        return in_bf16 and self.replicas == 1 and self.profile.reduce_dtype == "bf16"

    @property
    def may_keep_gathered(self) -> bool:
        """Whether a pass makes layers' weights from what GPUs hold: each other's parts, or float32 ones of one GPU."""
        full_in_float32 = self.recipe.method == "full" and self.profile.optimizer_state == "fp32"
        made = self.shards > 1 or (full_in_float32 and self.accelerate.mixed_precision == "bf16")
        return made and not (self.accelerate.offload_params or self.accelerate.use_cpu)

    @property
    def embedding_in_ram(self) -> bool:
        """Whether embedding and head wait in host RAM, alone or with all else."""
        return self.accelerate.offload_params or self.profile.embedding_offload

    @property
    def streams_adamw(self) -> bool:
        """Whether AdamW of weights in host RAM is computed on the GPU, piece by piece; other optimizers are not."""
        in_float32 = is_adamw(self.recipe.training) and self.profile.optimizer_state == "fp32"
        return in_float32 and self.accelerate.offload_params and not self.accelerate.use_cpu

    @property
    def keeps_base_in_fp8(self) -> bool:
        """Whether training holds the decoder layers' frozen weights in fp8, not only multiplies them so."""
        return self.recipe.method == "lora" and self.profile.compute == "fp8"

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def result_folder(self) -> Path:
        """What training, or the chosen checkpoint, left: the folder of the adapter, or of the model for method full."""
        return Path(self.checkpoint or self.output_dir) / ("model" if self.recipe.method == "full" else ADAPTER)
