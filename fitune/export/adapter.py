"""Reads a PEFT adapter: which weights of the base it changes, and how.

LoRA on linear layers and trained token rows are understood; whatever else an adapter may ask for is refused by name.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from fitune.errors import UsageError
from fitune.weights.model_files import read_json
from fitune.weights.safetensors_files import Checkpoint

NEUTRAL_LORA_KEYS = {
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
    "trainable_token_indices",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "qalora_group_size",
    "runtime_config",
}
"Keys of adapter_config.json that are read here, or that say nothing about how the adapter is applied."


def saved_name(parameter: str) -> str:
    """A PeftModel parameter's name in adapter_model.safetensors: PEFT leaves out the adapter's own name."""
    return parameter.replace(".default", "")


class AdapterFile(Checkpoint):
    """The tensors of a PEFT folder, with its adapter_config.json as `config`."""

    def __init__(self, folder: Path):
        self.config = read_json(folder / "adapter_config.json", "give the folder of a PEFT LoRA adapter")
        super().__init__(folder)

    def _files(self):
        return {self.folder / "adapter_model.safetensors": None}


@dataclass(frozen=True)
class LoraPair:
    """weight += scale * B @ A; `a` and `b` name tensors [r, in] and [out, r] of the adapter file."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Lora:
    """What an adapter changes, by the base's weight names."""

    pairs: dict[str, LoraPair]
    tokens: dict[str, tuple[str, list[int]]]
    "Weight -> the adapter's tensor [n, hidden] and the n rows that it replaces."


def read_adapter(file: AdapterFile) -> Lora:
    """The adapter's pairs and token rows; UsageError for anything that `merge` would not apply exactly."""
    _refuse_unsupported(file)
    pairs, tokens = {}, {}
    for name in file.tensors:
        module, _, kind = re.sub(r"^base_model\.model\.", "", name).partition(".lora_")
        if kind in ("A.weight", "B.weight"):
            prefix = name.removesuffix(kind)
            pairs[f"{module}.weight"] = LoraPair(f"{prefix}A.weight", f"{prefix}B.weight", _scale(file, module, prefix))
        elif module.endswith(".token_adapter.trainable_tokens_delta"):
            module = module.removesuffix(".token_adapter.trainable_tokens_delta")
            tokens[f"{module}.weight"] = (name, _token_rows(file, module, name))
        else:
            raise UsageError(f"{file[name].file}: tensor {name} is neither LoRA on a linear layer nor token rows")
    if not pairs and not tokens:
        raise UsageError(f"{file.folder}: the adapter holds no tensors")
    return Lora(pairs, tokens)


def _refuse_unsupported(file: AdapterFile) -> None:
    config, where = file.config, file.folder / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; merge reads LORA")
    initial = config.get("init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UsageError(f"{where}: init_lora_weights={initial!r} changes the base; convert it to plain LoRA with PEFT")
    plain = {"peft_type", "init_lora_weights", "bias" if config.get("bias") == "none" else ""} | NEUTRAL_LORA_KEYS
    for key, value in config.items():
        if value and key not in plain:
            raise UsageError(f"{where}: {key}={value!r} is not supported; merge reads plain LoRA and trained tokens")


def _scale(file: AdapterFile, module: str, prefix: str) -> float:
    """alpha / r as PEFT finds it: per-module patterns first, then the adapter's own values."""
    where = file.folder / "adapter_config.json"
    try:
        r = _by_pattern(file.config.get("rank_pattern"), module, file.config["r"])
        alpha = _by_pattern(file.config.get("alpha_pattern"), module, file.config["lora_alpha"])
        scale = float(alpha) / (math.sqrt(r) if file.config.get("use_rslora") else r)
        if not math.isfinite(scale):
            raise ValueError(f"alpha {alpha} / r {r} is not a number")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError, re.error) as error:
        raise UsageError(f"{where}: r, lora_alpha or their patterns are unusable: {error!r}") from None
    a, b = file[f"{prefix}A.weight"], file[f"{prefix}B.weight"]
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
        raise UsageError(f"{file.folder / 'adapter_config.json'}: trainable_token_indices does not match tensor {name}")
    return indices
