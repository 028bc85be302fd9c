"""WHAT is learned: the typed contents of a recipe, each knob once, with its meaning, unit and limits."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fitune.config.fields import Flag, Method, PositiveFloat, PositiveInt, Strict

DataFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
RowWeight = Annotated[float, Field(gt=0, le=1000)]
CHAT_TEMPLATES = ("llama3", "chatml", "plain")
"Those that are shipped."
TEMPLATE_CHOICES = f"{', '.join(CHAT_TEMPLATES)}, tokenizer or the path of a .jinja file"


def _checked_template(choice: str) -> str:
    """The recipe's choice. Raises ValueError for what is none."""
    if choice in (*CHAT_TEMPLATES, "tokenizer") or choice.endswith(".jinja"):
        return choice
    raise ValueError(f"allowed are {TEMPLATE_CHOICES}")


ChatTemplate = Annotated[str, AfterValidator(_checked_template)]


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
    """Linear layers that get an adapter: all of a block, or some by name, such as [q_proj, v_proj].
    `layers.3.mlp.up_proj` is that of one layer; `plan` counts it in all."""
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
    global_batch_size: Annotated[int, Field(gt=0, le=1_000_000)]
    "Rows per optimizer step over all processes."
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # numpy's generator, which draws too, takes no more
    "Decides the adapter's first weights, dropout and the order of rows; in `prepare` the rows that are held out."
    early_stopping: EarlyStopping | None = None
    "By `training.metric_for_best_model`; null trains to the end."
    training: dict[str, Any] = {}
    "Fields of TRL's SFTConfig by their own names; the ones owned elsewhere are refused."

    @model_validator(mode="after")
    def _method_and_lora_agree(self):
        if self.method == "full" and self.lora is not None:
            raise ValueError(
                "method 'full' trains every weight: take the 'lora:' block away (--set lora=null), or set method: lora"
            )
        if self.method != "full" and self.lora is None:
            raise ValueError(f"method '{self.method}' needs a 'lora:' block")
        return self
