"""What is tried of SFTConfig's fields, each alone: a value or more for every field, and what it needs beside it.

Imports nothing heavy, so that the page can be held against it in a moment.
"""

from dataclasses import dataclass

from fitune.config.installed_names import sft_config_fields, training_enums
from fitune.config.optimizers import ARGUMENTS, all_optimizers
from fitune.config.schedules import ARGUMENTS as SCHEDULES
from fitune.config.schedules import NEEDED
from fitune.config.training_fields import CHOICES, OWNED_ELSEWHERE, REFUSED

BASE = {
    "max_steps": "6", "learning_rate": "2e-3", "logging_steps": "1", "save_steps": "3", "report_to": "none",
}  # fmt: skip
"The recipe's `training:` block to which one field is added."
EVALUATED = ("eval_strategy=steps", "eval_steps=2")
WORKER = ("dataloader_num_workers=1",)
SCHEDULE_ARGUMENTS = {"min_lr": "1e-4", "num_decay_steps": "3"}


@dataclass(frozen=True)
class Trial:
    """`field=value`, tried with `needs` beside it; without it, what is asked for must be refused."""

    field: str
    value: str
    needs: tuple[str, ...] = ()
    same: str = ""
    "Why the run may be the same, to the last digit, as without the field. Empty: something must differ."

    @property
    def sets(self) -> tuple[str, ...]:
        return (*self.needs, f"{self.field}={self.value}")

    @property
    def written(self) -> str:
        beside = f" with {' '.join(self.needs)}" if self.needs else ""
        return f"{self.value}{beside}"


def trials() -> list[Trial]:
    """Of every field that a recipe may set."""
    return [
        *_LENGTH,
        *_schedules(),
        *_OPTIMIZER,
        *_LOSS,
        *_LOGGING,
        *_TRACKERS,
        *_EVALUATION,
        *_SAVING,
        *_rows(),
        *_GPUS,
    ]


def fields_not_set_here() -> list[Trial]:
    """Of every field that fitune owns elsewhere or refuses, one value of its type."""
    fields = sft_config_fields()
    return [Trial(name, _some_value(fields[name])) for name in fields if name in OWNED_ELSEWHERE or name in REFUSED]


def optimizers_not_used() -> list[str]:
    return [name for name in all_optimizers() if name not in ARGUMENTS]


def _some_value(annotation: str) -> str:
    for kind, value in (("bool", "true"), ("int", "2"), ("float", "0.5"), ("list", "[x]"), ("dict", "{a: 1}")):
        if kind in annotation:
            return value
    return "x"


_LENGTH = [
    Trial("num_train_epochs", "0.67", ("max_steps=-1",)),
    Trial("max_steps", "4"),
]
_OPTIMIZER = [
    Trial("learning_rate", "1e-3"),
    Trial("warmup_steps", "3"),
    Trial("warmup_steps", "0.5"),
    Trial("optim", "adamw_torch"),
    *(Trial("optim", name) for name in ("sgd", "rmsprop", "adagrad")),
    Trial("optim_args", "momentum=0.9", ("optim=sgd",)),
    Trial("optim_args", "'momentum=0.5,nesterov=true'", ("optim=sgd",)),
    Trial("optim_args", "'centered=true,alpha=0.9,eps=1e-6'", ("optim=rmsprop",)),
    Trial("optim_args", "'lr_decay=0.1,eps=1e-6'", ("optim=adagrad",)),
    Trial("weight_decay", "0.5"),
    Trial("adam_beta1", "0.5"),
    Trial("adam_beta2", "0.9"),
    Trial("adam_epsilon", "0.1"),
    Trial("max_grad_norm", "0.01"),
    Trial("max_grad_norm", "0"),
]
_LOSS = [
    Trial("label_smoothing_factor", "0.1"),
    Trial("neftune_noise_alpha", "5"),
    Trial("loss_type", "dft"),
]
_LOGGING = [
    Trial("logging_strategy", "epoch"),
    Trial("logging_strategy", "no"),
    Trial("logging_steps", "2"),
    Trial("logging_steps", "0.5"),
    Trial("logging_first_step", "true", ("logging_steps=4",)),
    Trial("log_on_each_node", "false", same="a run of one machine has one log; machines beyond the first fall silent"),
    Trial("log_level", "info"),
    Trial("log_level", "error", same="nothing is logged at this level in a good run"),
    Trial("log_level_replica", "info"),
    Trial("log_level_replica", "error", same="nothing is logged at this level in a good run"),
    Trial("disable_tqdm", "true", same="it hides the live line, which only a terminal shows"),
]
_TRACKERS = [
    Trial("report_to", "tensorboard"),
    Trial("report_to", "[tensorboard]"),
    Trial("report_to", "all"),
    Trial("report_to", "wandb"),
    Trial("run_name", "x"),
    *(Trial(name, "x") for name in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")),
]
_EVALUATION = [
    Trial("eval_strategy", "epoch"),
    Trial("eval_strategy", "steps", ("eval_steps=2",)),
    Trial("eval_steps", "2", ("eval_strategy=steps",)),
    Trial("eval_steps", "0.5", ("eval_strategy=steps",)),
    Trial("eval_delay", "3", EVALUATED),
    Trial("eval_on_start", "true", EVALUATED),
    Trial("load_best_model_at_end", "true", ("eval_strategy=steps", "eval_steps=3", "learning_rate=0.5")),
    Trial("metric_for_best_model", "token_accuracy", ("eval_strategy=steps", "eval_steps=3", "save_strategy=best")),
]
_SAVING = [
    Trial("save_strategy", "epoch"),
    Trial("save_strategy", "no"),
    Trial("save_strategy", "best", EVALUATED),
    Trial("save_steps", "2"),
    Trial("save_steps", "0.3"),
    Trial("save_total_limit", "1"),
]
_GPUS = [
    Trial("tf32", "true"),
    Trial("torch_empty_cache_steps", "2"),
    Trial("full_determinism", "true", same="a run on the CPU repeats itself anyway"),
]


def _schedules() -> list[Trial]:
    found = []
    for name in training_enums()["SchedulerType"]:
        arguments = [key for key in NEEDED.get(name, ())][:1]
        needs = [f"lr_scheduler_kwargs.{key}={SCHEDULE_ARGUMENTS[key]}" for key in arguments]
        needs += EVALUATED if name == "reduce_lr_on_plateau" else ()
        found += [Trial("lr_scheduler_type", name, tuple(needs))] if name != "linear" else []
    for name, key, value in (
        ("cosine", "num_cycles", "1.5"), ("cosine_with_restarts", "num_cycles", "2"),
        ("polynomial", "lr_end", "1e-4"), ("polynomial", "power", "2"), ("inverse_sqrt", "timescale", "2"),
        ("cosine_with_min_lr", "min_lr", "1e-4"), ("cosine_with_min_lr", "min_lr_rate", "0.1"),
        ("warmup_stable_decay", "num_decay_steps", "3"),
    ):  # fmt: skip
        assert key in SCHEDULES[name]
        needs = (f"lr_scheduler_type={name}",)
        found.append(Trial("lr_scheduler_kwargs", f"{{{key}: {value}}}", needs))
    return found


def _rows() -> list[Trial]:
    same = "the same rows in the same order"
    return [
        Trial("dataloader_num_workers", "2", same=f"{same}, read by processes of their own"),
        Trial("dataloader_pin_memory", "false", same="pinned memory is for copies to a GPU"),
        Trial("dataloader_persistent_workers", "true", WORKER, same=f"{same}; workers live on from epoch to epoch"),
        Trial("dataloader_prefetch_factor", "3", WORKER, same=f"{same}, read further ahead"),
        *(
            Trial("dataloader_multiprocessing_context", way, WORKER, same=f"{same}; how workers start")
            for way in CHOICES["dataloader_multiprocessing_context"]
        ),
        Trial("train_sampling_strategy", "sequential"),
        Trial("pad_to_multiple_of", "64"),
    ]
