"""Reads a PEFT LoRA adapter: which weights of the base it changes, and how.

LoRA and DoRA on linear layers, LoRA on embeddings, trained token rows, and whole weights or biases saved beside them
are understood; whatever else an adapter may ask for is refused by name.
"""

import math
import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from fitune.config.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from fitune.errors import UsageError
from fitune.weights.safetensors_files import Checkpoint

NEUTRAL_KEYS = {
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "qalora_group_size",
    "runtime_config",
}
"Keys of adapter_config.json that are read here, or that say nothing about how the adapter is applied."
PICKLED_WEIGHTS = "adapter_model.bin"
"What PEFT wrote before safetensors."
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
TRAINED_BIASES = ("all", "lora_only")
"`bias` of adapter_config.json: those of all modules, or of those with LoRA, are trained and saved, if there are any."
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
SAVED_MODULE, BEFORE_TRAINING = ".modules_to_save.", ".original_module."
"PEFT's two copies of such a module. The first is trained, and stands there under the weight's own name as well."
RESIZED_WITH_THE_VOCABULARY = ("embed_tokens", "lm_head")
"PEFT saves them unasked where tokens were added."


def saved_name(parameter: str) -> str:
    """A PeftModel parameter's name in adapter_model.safetensors: PEFT leaves out the adapter's own name."""
    return parameter.replace(".default", "")


class AdapterFile(Checkpoint):
    """The tensors of a PEFT folder, with its adapter_config.json as `config`."""

    def __init__(self, folder: Path):
        self.config = read_adapter_config(folder)
        super().__init__(folder)

    def _files(self):
        if (pickled := self.folder / PICKLED_WEIGHTS).exists() and not (self.folder / ADAPTER_WEIGHTS).exists():
            raise UsageError(f"{pickled}: a pickle, which is not read; load it with PEFT and save it as safetensors")
        return {self.folder / ADAPTER_WEIGHTS: None}


@dataclass(frozen=True)
class LoraPair:
    """weight += scale * B @ A; `a` and `b` name tensors [r, in] and [out, r] of the adapter file."""

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    "DoRA's tensor [out]: every row of the sum is scaled to that length."


@dataclass(frozen=True)
class EmbeddingPair:
    """weight += scale * (B @ A)^T, for an embedding [vocabulary, hidden]: `a` is [r, vocabulary], `b` [hidden, r]."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Lora:
    """What an adapter changes, by the base's weight names."""

    pairs: dict[str, LoraPair] = field(default_factory=dict)
    embeddings: dict[str, EmbeddingPair] = field(default_factory=dict)
    tokens: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    "Weight -> the adapter's tensor [n, hidden] and the n rows that it replaces."
    replaced: dict[str, str] = field(default_factory=dict)
    "Weight or bias -> the adapter's tensor that stands in its place (PEFT's modules_to_save, and trained biases)."

    @property
    def biases(self) -> list[str]:
        """Trained by themselves. PEFT puts them into the base, and does not switch them off with the rest."""
        of_modules = {name.removesuffix("weight") + "bias" for name in self.replaced if name.endswith(".weight")}
        return [name for name in self.replaced if name.endswith(".bias") and name not in of_modules]

    def changes(self) -> set[str]:
        return {*self.pairs, *self.embeddings, *self.tokens, *self.replaced}


def read_adapter(file: AdapterFile) -> Lora:
    """What the adapter changes; UsageError for anything that `merge` would not apply exactly."""
    _refuse_unsupported(file)
    lora, known = Lora(), set()
    for name in file.tensors:
        if name not in known:
            known |= _read_change(file, name, lora)
    if unknown := next((name for name in file.tensors if name not in known), None):
        raise UsageError(
            f"{file[unknown].file}: tensor {unknown} is neither LoRA, nor token rows, nor a module of modules_to_save"
        )
    if not lora.changes():
        raise UsageError(f"{file.folder}: the adapter holds no tensors")
    return lora


def _read_change(file: AdapterFile, name: str, lora: Lora) -> set[str]:
    """Adds to `lora` what tensor `name` belongs to; returns the tensors that this accounts for."""
    if part := _ending(name, LINEAR):
        prefix = name.removesuffix(part)
        a, b, magnitude = f"{prefix}{LINEAR[0]}", f"{prefix}{LINEAR[1]}", _magnitude(file, prefix)
        lora.pairs[f"{_module(prefix)}.weight"] = LoraPair(a, b, _scale(file, _module(prefix), a, b), magnitude)
        return {a, b, magnitude} - {None}
    if part := _ending(name, EMBEDDING):
        prefix = name.removesuffix(part)
        a, b = f"{prefix}{EMBEDDING[0]}", f"{prefix}{EMBEDDING[1]}"
        if _magnitude(file, prefix):
            raise UsageError(
                f"{file.folder / ADAPTER_CONFIG}: use_dora on {_module(prefix)}: merge reads DoRA on linears"
            )
        lora.embeddings[f"{_module(prefix)}.weight"] = EmbeddingPair(a, b, _scale(file, _module(prefix), a, b))
        return {a, b}
    if _ending(name, (TOKEN_ROWS,)):
        module = _module(name.removesuffix(TOKEN_ROWS))
        lora.tokens[f"{module}.weight"] = (name, _token_rows(file, module, name))
        return {name}
    if BEFORE_TRAINING in name and name.replace(BEFORE_TRAINING, SAVED_MODULE) in file:
        return {name}
    weight = _weight(name)
    if not _is_whole(file, weight):
        return set()
    other = lora.replaced.setdefault(weight, name)
    if other != name and (file[other].shape != file[name].shape or (file.read(other) != file.read(name)).any()):
        raise UsageError(f"{file[name].file}: {other} and {name} stand for one weight, and differ")
    return {name}


def _weight(name: str) -> str:
    """The base's name of a weight that stands in the adapter whole.

    Where tokens were added, PEFT saves embedding and head as they are, with the wrappers that it has put around them.
    """
    for wrapper in (".base_layer.", ".token_adapter.", SAVED_MODULE):
        name = name.replace(wrapper, ".")
    return _without_prefix(name)


def _ending(name: str, endings: tuple[str, ...]) -> str | None:
    return next((ending for ending in endings if name.endswith(f".{ending}")), None)


def _without_prefix(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _module(prefix: str) -> str:
    return _without_prefix(prefix).removesuffix(".")


def _is_whole(file: AdapterFile, weight: str) -> bool:
    module, _, parameter = weight.rpartition(".")
    if parameter == "bias" and file.config.get("bias") in TRAINED_BIASES:
        return True
    saved = tuple([*(file.config.get("modules_to_save") or []), *RESIZED_WITH_THE_VOCABULARY])
    within = accumulate(module.split("."), "{}.{}".format)  # a module that is saved may hold others
    return parameter in ("weight", "bias") and any(name.endswith(saved) for name in within)  # PEFT's rule


def _magnitude(file: AdapterFile, prefix: str) -> str | None:
    if not file.config.get("use_dora"):
        return None
    name = next((prefix + part for part in MAGNITUDES if prefix + part in file), None)
    if name is None:
        raise UsageError(f"{file.folder / ADAPTER_CONFIG}: use_dora, but {prefix}lora_magnitude_vector is missing")
    return name


def _refuse_unsupported(file: AdapterFile) -> None:
    config, where = file.config, file.folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; merge reads LORA")
    initial = config.get("init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UsageError(f"{where}: init_lora_weights={initial!r} changes the base; convert it to plain LoRA with PEFT")
    knows_bias = config.get("bias") in ("none", *TRAINED_BIASES)
    plain = {"peft_type", "init_lora_weights", "bias" if knows_bias else ""} | NEUTRAL_KEYS
    for key, value in config.items():
        if value and key not in plain:
            raise UsageError(
                f"{where}: {key}={value!r} is not supported; merge reads LoRA, DoRA, trained tokens, trained biases "
                f"and modules_to_save"
            )


def _scale(file: AdapterFile, module: str, a_name: str, b_name: str) -> float:
    """alpha / r as PEFT finds it: per-module patterns first, then the adapter's own values."""
    where = file.folder / ADAPTER_CONFIG
    try:
        r = _by_pattern(file.config.get("rank_pattern"), module, file.config["r"])
        alpha = _by_pattern(file.config.get("alpha_pattern"), module, file.config["lora_alpha"])
        scale = float(alpha) / (math.sqrt(r) if file.config.get("use_rslora") else r)
        if not math.isfinite(scale):
            raise ValueError(f"alpha {alpha} / r {r} is not a number")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError, re.error) as error:
        raise UsageError(f"{where}: r, lora_alpha or their patterns are unusable: {error!r}") from None
    a, b = file[a_name], file[b_name]
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == r:
        raise UsageError(f"{a.file}: {module}: lora_A {a.shape} and lora_B {b.shape} do not have rank {r} of {where}")
    return scale


def _by_pattern(patterns: dict | None, module: str, default):
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _token_rows(file: AdapterFile, module: str, name: str) -> list[int]:
    """Token ids in the order of the tensor's rows. PEFT writes one list for the embedding, or one per module."""
    indices = file.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((ids for key, ids in indices.items() if f".{module}".endswith(f".{key}")), None)
    is_list = isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
    if not is_list or (len(indices),) != file[name].shape[:1]:
        raise UsageError(f"{file.folder / ADAPTER_CONFIG}: trainable_token_indices does not match tensor {name}")
    return indices
