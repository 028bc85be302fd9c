"""The SFTConfig of a run, made before anything is loaded: what transformers and TRL refuse, they refuse at once."""

import os

from trl import SFTConfig

from fitune.config.evaluation import best_model_fields
from fitune.config.schema import Run
from fitune.errors import UsageError


def training_arguments(run: Run) -> SFTConfig:
    """The recipe's `training:` block, and the fields that recipe, profile and accelerate config own.

    Raises UsageError for what transformers or TRL refuse on this machine.
    """
    recipe, profile = run.recipe, run.profile
    values = {"report_to": "tensorboard", "logging_nan_inf_filter": False, "disable_tqdm": False} | recipe.training
    values |= best_model_fields(recipe.training)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.folder / "tensorboard"))
    values |= {
        "output_dir": str(run.folder / "checkpoints"),
        "per_device_train_batch_size": profile.micro_batch,
        "per_device_eval_batch_size": profile.micro_batch,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "packing_strategy": "bfd",
        "dataset_kwargs": {"skip_prepare_dataset": True},  # rows come with their labels: fitune.data.dataset
        "seed": recipe.seed,
        "use_cpu": run.accelerate.use_cpu,
        "activation_checkpointing": False,  # the layers see to it: fitune.model.activations
        "bf16": False,  # the model computes in bf16 by itself; no autocast around it
        # unreduced gradients would be whole on every rank, so each micro batch is reduced to the rank's own rows;
        # for one rank see ShardedSFTTrainer.training_step
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        # Trainer's own way to save optimizers does not know this sharding; see ShardedSFTTrainer._save_checkpoint
        "save_only_model": True,
    }
    try:
        return SFTConfig(**values)
    except (ValueError, TypeError, ImportError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{run.folder / 'run.yaml'}: training: refused by TRL's SFTConfig: {said}") from error
