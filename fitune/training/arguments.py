"""The SFTConfig of a run, made before anything is loaded: what transformers and TRL refuse, they refuse at once."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import get_scheduler
from trl import SFTConfig, SFTTrainer

from fitune.config.evaluation import best_model_fields
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.optimizers.adamw_8bit import AdamW8bit
from fitune.optimizers.adamw_rows import AdamWOnRows
from fitune.optimizers.adamw_streamed import AdamWStreamed

STEPS_TO_TRY = 1000
"Of a schedule, where the number of steps follows from the rows."


def training_arguments(run: Run) -> SFTConfig:
    """The recipe's `training:` block, and the fields that recipe, profile and accelerate config own.

    Raises UsageError for what transformers or TRL refuse on this machine.
    """
    recipe, profile = run.recipe, run.profile
    values = {"report_to": "tensorboard", "logging_nan_inf_filter": False} | recipe.training
    values |= best_model_fields(recipe.training)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.folder / "tensorboard"))
    values |= {
        "disable_tqdm": True,  # the launcher shows progress, or not if the recipe has this: fitune.launching.terminal
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
    with _refused_by("training", "TRL's SFTConfig", run):
        arguments = SFTConfig(**values)
    _try_out(arguments, run)
    return arguments


@contextmanager
def _refused_by(key: str, whom: str, run: Run) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, ArithmeticError, LookupError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{run.folder / 'run.yaml'}: {key}: refused by {whom}: {said}") from error


def _try_out(arguments: SFTConfig, run: Run) -> None:
    """Makes torch's optimizer for one weight, and the schedule of its rate. Raises UsageError for what they refuse."""
    steps = arguments.max_steps if arguments.max_steps > 0 else STEPS_TO_TRY
    with _refused_by("training.optim_args", f"optimizer {arguments.optim.value}", run):
        kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
    with _refused_by("training.lr_scheduler_kwargs", f"schedule {arguments.lr_scheduler_type.value}", run):
        schedule = get_scheduler(
            arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(steps), steps,
            arguments.lr_scheduler_kwargs,
        )  # fmt: skip
        for share in getattr(schedule, "lr_lambdas", ()):
            if not all(math.isfinite(share(step)) for step in (0, 1, steps // 2, steps)):
                raise ValueError(f"a learning rate that is not finite, of {arguments.lr_scheduler_kwargs}")


def own_optimizer(run: Run, arguments: SFTConfig) -> tuple[type[torch.optim.Optimizer], dict]:
    """The optimizer that the profile asks for, or Trainer's, as Trainer takes it."""
    if run.profile.optimizer_state == "fp32":
        torchs, options = SFTTrainer.get_optimizer_cls_and_kwargs(arguments)
        if run.streams_adamw:
            return AdamWStreamed, options | {"device": arguments.device}
        if run.recipe.method == "full" and "fused" not in options:
            options["foreach"] = False  # else all weights' intermediate results at once, 4 bytes for each weight
        return AdamWOnRows if torchs is torch.optim.AdamW else torchs, options
    return AdamW8bit, {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "seed": run.recipe.seed,
        "offload": run.profile.optimizer_offload,
    }
