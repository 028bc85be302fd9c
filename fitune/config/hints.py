"""What a reader of other programs may type, and what it is called here."""

from fitune.config.installed_names import sft_config_fields
from fitune.config.recipe import Base, Data, EarlyStopping, Lora, Recipe
from fitune.config.schema import Profile
from fitune.config.training_fields import OWNED_ELSEWHERE, REFUSED

SYNONYMS = {
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "steps": "training.max_steps",
    "optimizer": "training.optim",
    "scheduler": "training.lr_scheduler_type",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup": "training.warmup_steps",
    "evaluation_strategy": "training.eval_strategy",
    "early_stop": "early_stopping.patience",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_threshold": "early_stopping.threshold",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "max_seq_length": "max_length",
    "extend": "extends",
    "inherits": "extends",
    "parent": "extends",
    "max_seq_len": "max_length",
    "seq_length": "max_length",
    "seq_len": "max_length",
    "sequence_len": "max_length",
    "context_length": "max_length",
    "cutoff_len": "max_length",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "modules_to_save": "lora.trainable_tokens",
    "model_name_or_path": "base.model",
    "model_name": "base.model",
    "model_id": "base.model",
    "base_model": "base.model",
    "dataset_name": "data.dataset",
    "dataset_path": "data.dataset",
    "train_file": "data.dataset",
    "path": "data.dataset",
    "template": "data.chat_template",
    "system_prompt": "data.system_message",
    "gpus": "profile.num_gpus",
    "micro_batch_size": "profile.micro_batch",
    "fp8": "profile.compute",
}
"A word of other programs: the key that it has here."
WHERE = {
    "output_dir": "use --output",
    "output": "use --output",
    "logging_dir": "use --output: tensorboard/ is in the run's folder",
    "resume": "use --resume",
    "warmup_ratio": "set training.warmup_steps to a share of all steps, below 1",
    "grad_accum": OWNED_ELSEWHERE["gradient_accumulation_steps"],
    "gradient_accumulation": OWNED_ELSEWHERE["gradient_accumulation_steps"],
    "num_processes": "set it in the accelerate config; profile.accelerate_config names that",
    "wandb": "set training.report_to=wandb",
    "load_in_4bit": "set method=qlora",
    "quantization": "set method=qlora",
    "use_lora": "set method=lora or method=qlora",
    "qlora": "set method=qlora",
    "use_peft": "set method=lora or method=qlora",
    "use_dora": "the adapters are plain LoRA",
    "bias": "the adapters have no bias",
    "flash_attention": "the fastest attention that is installed is used",
    "attn_implementation": "the fastest attention that is installed is used",
    "offload": "use a profile whose accelerate config has fsdp_offload_params, such as fsdp_offload_4gpu",
    "cpu_offload": "use a profile whose accelerate config has fsdp_offload_params, such as fsdp_offload_4gpu",
}
"A word of other programs that is no key here: what to do instead."
EARLIER = {
    "hybrid_sharding": "replicas took its place, the copies of the model: as many as machines for true, 1 for false",
    "activation_checkpointing": "kept_layers took its place: 0 for true",
}
"A profile's keys in earlier versions: what took their place."
_BLOCKS = {
    "": Recipe, "base.": Base, "data.": Data, "lora.": Lora, "early_stopping.": EarlyStopping, "profile.": Profile,
}  # fmt: skip


def became(key: str) -> str | None:
    """What to say of a key that profiles had in earlier versions. None: they never had it."""
    return f"; {EARLIER[key]}" if key in EARLIER else None


def meant_by(key: str) -> str | None:
    """What to say of a key that no recipe has, as `; did you mean '…'?`: another word, another block. None: no idea."""
    last = key.rpartition(".")[2].lower().replace("-", "_")
    if last in SYNONYMS:
        return f"; did you mean '{SYNONYMS[last]}'?"
    if last in WHERE:
        return f"; {WHERE[last]}"
    owners = [f"{prefix}{last}" for prefix, block in _BLOCKS.items() if last in block.model_fields]
    if owner := next((owner for owner in owners if owner != key), None):
        return f"; did you mean '{owner}'?"
    if last in OWNED_ELSEWHERE:
        return f"; {OWNED_ELSEWHERE[last]}"
    if last in REFUSED:
        return f"; it cannot be set: {REFUSED[last]}"
    is_field = last in sft_config_fields() and key != f"training.{last}"
    return f"; did you mean 'training.{last}'?" if is_field else None
