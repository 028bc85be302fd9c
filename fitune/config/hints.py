"""What a reader of other programs may type, and what it is called here."""

from fitune.config.installed_names import sft_config_fields
from fitune.config.schema import Base, Data, Lora, Profile, Recipe

TRAINING_SYNONYMS = {
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "steps": "training.max_steps",
    "optimizer": "training.optim",
    "scheduler": "training.lr_scheduler_type",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps (a share of all steps where it is below 1)",
    "evaluation_strategy": "training.eval_strategy",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_threshold": "early_stopping.threshold",
    "logging_dir": "--output (tensorboard/ is in the run's folder)",
    "batch_size": "global_batch_size",
    "max_seq_length": "max_length",
}
SYNONYMS = TRAINING_SYNONYMS | {
    "extend": "extends",
    "inherits": "extends",
    "parent": "extends",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "model_name_or_path": "base.model",
    "model_name": "base.model",
    "dataset_name": "data.dataset",
    "template": "data.chat_template",
    "seq_length": "max_length",
    "max_seq_len": "max_length",
    "gpus": "profile.num_gpus",
    "early_stop": "early_stopping.patience",
    "output_dir": "--output",
    "output": "--output",
}
_BLOCKS = {"": Recipe, "base.": Base, "data.": Data, "lora.": Lora, "profile.": Profile}


def meant_by(key: str) -> str | None:
    """What a key that no recipe has is probably meant for, as `--set` wants it: another word, another block."""
    last = key.rpartition(".")[2]
    if last in SYNONYMS:
        return SYNONYMS[last]
    owners = [f"{prefix}{last}" for prefix, block in _BLOCKS.items() if last in block.model_fields]
    owners += [f"training.{last}"] if last in sft_config_fields() else []
    return next((owner for owner in owners if owner != key), None)
