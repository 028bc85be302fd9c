"""Checks a recipe's `training:` block against TRL's SFTConfig: unknown names, wrong types, knobs owned elsewhere."""

import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fitune.config.installed_names import sft_config_fields, training_enums
from fitune.errors import UsageError, nearest

_PROFILE, _ACCELERATE = "the memory profile", "the accelerate config"
_SHARDING = "fitune shards the model itself; offload and reshard are set in the accelerate config"
OWNED_ELSEWHERE = {
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "per_device_train_batch_size": f"set micro_batch in {_PROFILE}",
    "per_device_eval_batch_size": f"set micro_batch in {_PROFILE}",
    "gradient_accumulation_steps": "it follows from global_batch_size, micro_batch and the number of processes",
    "auto_find_batch_size": f"set micro_batch in {_PROFILE}",
    "gradient_checkpointing": f"set kept_layers in {_PROFILE}",
    "activation_checkpointing": f"set kept_layers in {_PROFILE}",
    "activation_offloading": f"set activation_offload in {_PROFILE}",
    "bf16": f"set mixed_precision in {_ACCELERATE}",
    "fp16": f"set mixed_precision in {_ACCELERATE} (bf16 or no)",
    "use_cpu": f"set use_cpu in {_ACCELERATE}",
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "deepspeed": _SHARDING,
    "ddp_backend": _SHARDING,
    "max_length": "set max_length at the top of the recipe",
    "packing": "set packing at the top of the recipe",
    "packing_strategy": "fitune packs whole conversations (bfd)",
    "padding_free": "set packing at the top of the recipe",
    "seed": "set seed at the top of the recipe",
    "data_seed": "set seed at the top of the recipe",
    "chat_template_path": "set data.chat_template",
    "eos_token": "set data.chat_template",
    "pad_token": "set data.chat_template",
    "assistant_only_loss": "the loss is always on the assistant's tokens",
    "completion_only_loss": "the loss is always on the assistant's tokens",
    "dataset_text_field": "rows are conversations; see data.prepared",
    "dataset_kwargs": "rows are conversations; see data.prepared",
    "model_init_kwargs": "set base.model and base.revision",
    "trust_remote_code": "code from a model repository is never run",
    "use_liger_kernel": "Liger's kernels are used on GPUs by default",
    "liger_kernel_config": "Liger's kernels are used on GPUs by default",
    "save_only_model": "a checkpoint is always whole, so that it can be resumed",
    "greater_is_better": "it follows from metric_for_best_model: a loss is better small, an accuracy large",
    "restore_callback_states_from_checkpoint": "use --resume",
    "ignore_data_skip": "resuming always continues at the next row",
    "push_to_hub": "merge the run, then `hf upload` the folder",
    "hub_token": "the token is read from the login or HF_TOKEN only",
}


def check_training_block(training: dict[str, Any], source: str) -> dict[str, Any]:
    """The block with values converted to their fields' types (YAML reads `2e-4` as text). Raises UsageError."""
    fields = sft_config_fields()
    checked = {}
    for name, value in training.items():
        if name in OWNED_ELSEWHERE:
            raise UsageError(f"{source}: training.{name} is not set here: {OWNED_ELSEWHERE[name]}")
        if name not in fields:
            raise UsageError(f"{source}: training.{name} is not a field of TRL's SFTConfig{nearest(name, fields)}")
        checked[name] = _convert(name, value, fields[name], source)
    return checked


def _convert(name: str, value: Any, annotation: str, source: str) -> Any:
    plain_types = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
    parts = [part.strip() for part in re.split(r"\|", annotation)]
    for allowed in (training_enums()[part] for part in parts if part in training_enums()):
        if value not in allowed:
            raise UsageError(f"{source}: training.{name}: unknown value {value!r}{nearest(str(value), allowed)}")
    if name == "max_steps" and isinstance(value, int) and value < 1 and value != -1:
        raise UsageError(
            f"{source}: training.max_steps: {value} is not a number of steps; -1: as num_train_epochs says"
        )
    if not all(part in plain_types for part in parts):
        return value  # containers are checked by SFTConfig itself
    kinds = [plain_types[part] for part in parts]
    if type(value) in kinds or (value is None and type(None) in kinds):
        return value
    for kind in kinds:
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError:
            continue
    raise UsageError(f"{source}: training.{name}: {value!r} is not of type {annotation}")
