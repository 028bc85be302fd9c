"""The typed contents of recipes and memory profiles: each knob once, with its meaning, unit and limits."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fitune.config.model_sizes import checked_size

Method = Literal["full", "lora", "qlora"]
DataFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
YES_OR_NO = {"yes": True, "on": True, "no": False, "off": False}
"Words that YAML files and `--set` keep as they are written (`fitune.config.yaml_file`)."
Flag = Annotated[bool, BeforeValidator(lambda value: YES_OR_NO.get(str(value).lower(), value))]
RowWeight = Annotated[float, Field(gt=0, le=1000)]
AUTO = "auto"
"A profile's value that `plan` chooses."
SMALLEST = {"micro_batch": 1, "kept_layers": 0}
"The keys that a profile may leave to `plan`, with the value that takes least memory."
Rows = PositiveInt | Literal["auto"]
ModelSize = Annotated[str, AfterValidator(checked_size)]
CHAT_TEMPLATES = ("llama3", "chatml", "plain")
"Those that are shipped."
TEMPLATE_CHOICES = f"{', '.join(CHAT_TEMPLATES)}, tokenizer or the path of a .jinja file"


def _checked_template(choice: str) -> str:
    """The recipe's choice. Raises ValueError for what is none."""
    if choice in (*CHAT_TEMPLATES, "tokenizer") or choice.endswith(".jinja"):
        return choice
    raise ValueError(f"allowed are {TEMPLATE_CHOICES}")


ChatTemplate = Annotated[str, AfterValidator(_checked_template)]
ADAPTER = "adapter"
"The folder of a trained adapter, in a run and in its checkpoints."


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Base(Strict):
    """The model that is fine-tuned."""

    model: str
    "Hugging Face id, or a folder that holds config.json and *.safetensors."
    revision: str | None = None
    "Branch, tag or commit on the Hub."


class Source(Strict):
    """Rows that are mixed in beside `data.dataset`."""

    dataset: str
    "A Hub id, a local file or a folder of files."
    revision: str | None = None
    "Branch, tag or commit on the Hub."
    train_split: str = "train"
    "Split to learn from, or several: `train+validation`. A file in a folder belongs to the split in its name."
    test_split: str | None = "test"
    "Split held out for `eval`; null takes `data.test_fraction` of the training rows instead."
    format: DataFormat | None = None
    "As in `data`."
    columns: dict[str, str] = {}
    "As in `data`."
    keep: dict[str, Any] = {}
    "As in `data`."
    ignored_keys: list[str] = []
    "As in `data`."
    weight: RowWeight = 1.0
    "Times each training row is taken: 0.5 takes a random half of the rows, 2 takes each twice."


class Data(Strict):
    """What is learned from, and how a conversation becomes text."""

    dataset: str
    "What `prepare` reads: a Hub id, a local file (.jsonl, .json, .parquet, .arrow, .csv) or a folder of them."
    revision: str | None = None
    "Branch, tag or commit of the data set on the Hub."
    prepared: str
    "Folder with train.jsonl and test.jsonl: `prepare` writes it, `train` and `eval` read it."
    train_split: str = "train"
    "Split to learn from, or several: `train+validation`. A file in a folder belongs to the split in its name."
    test_split: str | None = "test"
    "Split held out for `eval`; null takes `test_fraction` of the training rows instead."
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    "Share of the training rows that is held out where there is no test split."
    system_message: str | None = None
    "Put first in conversations that have no system message."
    chat_template: ChatTemplate = "llama3"
    "`llama3`, `chatml`, `plain` (no tokens but BOS and EOS), `tokenizer` (its own), or the path of a .jinja file."
    train_on: Literal["all", "last", "completion"] = "all"
    "Which answers are trained: all of a row, its last, or those after the user's last turn."
    reasoning: Literal["refuse", "drop"] = "refuse"
    "Thinking beside an answer that the chat template does not write: an error, or left out and counted."
    format: DataFormat | None = None
    "What the rows look like; null finds it out from the first row of each file."
    columns: dict[str, str] = {}
    "The format's column name: the name it has in the data, such as {output: response}."
    keep: dict[str, Any] = {}
    "Only rows whose columns have these values, such as {label: true}, {lang: [de, en]} or {score: '>= 4'}."
    ignored_keys: list[str] = []
    "Columns and keys of turns that are not looked at, because they only look like flags or ratings."
    weight: RowWeight = 1.0
    "Times each training row is taken: 0.5 takes a random half of the rows, 2 takes each twice."
    mix: list[Source] = []
    "Further sources, each with a weight of its own."
    invalid_rows: Literal["refuse", "drop"] = "refuse"
    "Rows that cannot be used (turns that don't alternate, empty answers, ...): an error, or left out and counted."
    long_rows: Literal["refuse", "drop", "cut"] = "refuse"
    "Rows longer than max_length: an error, left out, or cut after the last answer that fits."


class Lora(Strict):
    """Shape of the low-rank adapter, in PEFT's terms."""

    r: PositiveInt = 16
    "Rank of the two small matrices. A larger one learns more and takes more memory."
    alpha: PositiveFloat = 8
    "The adapter's output is multiplied by alpha / r."
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    "Share of the adapter's inputs that is set to zero in training. 0 is fastest."
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    "Linear layers that get an adapter: all of a block, or some by name, such as [q_proj, v_proj]."
    trainable_tokens: list[str] = []
    "Tokens whose embedding rows are trained too (the base model never saw the llama3 template's tokens)."


class EarlyStopping(Strict):
    """Ends training once evaluations, which `training.eval_strategy` asks for, get no better."""

    patience: PositiveInt = 3
    "Evaluations in a row that bring nothing better, then training ends."
    threshold: Annotated[float, Field(ge=0)] = 0.0
    "How much better one must be than the best before it to count as better."


class Recipe(Strict):
    """WHAT is learned. One file in recipes/."""

    description: str
    "One line, which `list` prints."
    base: Base
    "The model that is fine-tuned."
    data: Data
    "What is learned from."
    method: Method
    "`full` trains every weight, `lora` an adapter beside bf16 weights, `qlora` an adapter beside 4-bit weights."
    lora: Lora | None = None
    "Shape of the adapter, for the methods lora and qlora."
    max_length: PositiveInt
    "Tokens per row. `data.long_rows` says what becomes of longer rows, `packing` of shorter ones."
    packing: Flag = True
    "Fill each row with whole conversations (best fit decreasing) that do not see each other."
    global_batch_size: PositiveInt
    "Rows per optimizer step over all processes."
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # numpy's generator, which draws too, takes no more
    "Decides the adapter's first weights, dropout, the order of rows and the rows held out."
    early_stopping: EarlyStopping | None = None
    "By `training.metric_for_best_model`; null trains to the end."
    training: dict[str, Any] = {}
    "Fields of TRL's SFTConfig by their own names; the ones owned elsewhere are refused."

    @model_validator(mode="after")
    def _method_and_lora_agree(self):
        if self.method == "full" and self.lora is not None:
            raise ValueError("method 'full' trains every weight: remove the 'lora:' block or set method: lora")
        if self.method != "full" and self.lora is None:
            raise ValueError(f"method '{self.method}' needs a 'lora:' block")
        return self


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
    host_memory_gib: PositiveFloat
    "RAM of one machine."
    fits: dict[ModelSize, list[Method]] = {"any": list(get_args(Method))}
    """Methods by the model's size, which its config.json says: `{70b: [qlora]}`. A size is a number of parameters, or
    `tiny`, or `any`: `fitune.config.model_sizes`.
    """
    micro_batch: Rows = AUTO
    "Rows per process and forward pass. `auto`: as below."
    kept_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = AUTO
    """Layers that keep their activations for the backward pass; the others keep their input and compute the rest again.
    `auto`, here and in `micro_batch`: what `plan` finds to give the shortest step in the GPU's memory.
    """
    compute: Literal["auto", "bf16", "fp8"] = AUTO
    """In what the decoder layers' linears are multiplied in training: `fp8` needs a GPU of compute capability 8.9 or
    higher. Method lora then keeps their weights so, a byte each; full keeps and trains them as ever.
    `auto`: bf16, but where it was shown that fp8 learns as well (`fitune.planning.compute`). CPUs compute in float32,
    and emulate fp8.
    """
    optimizer_state: Literal["fp32", "bf16_8bit"] = "fp32"
    """What method full keeps for each weight. `fp32`: weight, gradient and the optimizer's moments in float32, 16
    bytes. `bf16_8bit`: weight and gradient in bf16, AdamW's moments in 8 bits, 6 bytes.
    """
    optimizer_offload: Flag = False
    """Keep gradients and the optimizer's moments in host RAM, weights on the GPU: 4 of 6 bytes. They visit the GPU
    piece by piece. For `optimizer_state: bf16_8bit`.
    """
    activation_offload: Flag = False
    "Move the inputs of layers that are not kept to host RAM until the backward pass needs them."
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
    gathers them again. `auto`, which is no such line in the file: what `plan` finds to give the shortest step; `true`
    where one GPU holds all weights, or host RAM.
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
    def gathers_between_gpus(self) -> bool:
        """Whether GPUs hold the layers between them, and send each other what one lacks."""
        return self.shards > 1 and not (self.accelerate.offload_params or self.accelerate.use_cpu)

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
