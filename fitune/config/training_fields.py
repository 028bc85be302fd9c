"""SFTConfig's fields that a recipe does not set, each with what to set instead or why not; limits of those it does."""

from collections.abc import Callable

_PROFILE, _ACCELERATE = "the memory profile", "the accelerate config"
_SHARDING = "fitune shards the model itself; offload and reshard are set in the accelerate config"
_PACKING = "set packing at the top of the recipe"
_ANSWERS = "the loss is always on the assistant's tokens"
_TEMPLATE = "set data.chat_template"
_ROWS = "rows are conversations; see data.prepared"
_KEPT_LAYERS = f"set kept_layers in {_PROFILE}"
_LIGER = "Liger's kernels are used on GPUs by default"
_PRECISION = f"set mixed_precision in {_ACCELERATE}"
_UPLOAD = "`push` uploads what a run trained"
_COMMANDS = "the commands train, eval and generate say what is done"
OWNED_ELSEWHERE = {
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "restore_callback_states_from_checkpoint": "use --resume",
    "per_device_train_batch_size": f"set micro_batch in {_PROFILE}",
    "per_device_eval_batch_size": f"set micro_batch in {_PROFILE}",
    "auto_find_batch_size": f"set micro_batch in {_PROFILE}",
    "gradient_accumulation_steps": "it follows from global_batch_size, micro_batch and the number of processes",
    "activation_checkpointing": _KEPT_LAYERS,
    "activation_checkpointing_kwargs": _KEPT_LAYERS,
    "gradient_checkpointing": _KEPT_LAYERS,
    "gradient_checkpointing_kwargs": _KEPT_LAYERS,
    "activation_offloading": f"set activation_offload in {_PROFILE}",
    "bf16": _PRECISION,
    "fp16": f"{_PRECISION} (bf16 or no)",
    "bf16_full_eval": f"an evaluation computes as training does; {_PRECISION}",
    "fp16_full_eval": f"an evaluation computes as training does; {_PRECISION}",
    "use_cpu": f"set use_cpu in {_ACCELERATE}",
    "local_rank": f"processes are counted by their launcher; set num_processes in {_ACCELERATE}",
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "deepspeed": _SHARDING,
    "accelerator_config": _SHARDING,
    "parallelism_config": _SHARDING,
    "ddp_backend": _SHARDING,
    "ddp_find_unused_parameters": _SHARDING,
    "ddp_bucket_cap_mb": _SHARDING,
    "ddp_broadcast_buffers": _SHARDING,
    "ddp_static_graph": _SHARDING,
    "ddp_timeout": "ranks are watched; set FITUNE_HUNG_AFTER_SECONDS where they are slow",
    "max_length": "set max_length at the top of the recipe",
    "packing": _PACKING,
    "eval_packing": f"held-out rows are packed as all rows, which changes no loss; {_PACKING}",
    "packing_strategy": "fitune packs whole conversations (bfd)",
    "padding_free": _PACKING,
    "truncation_mode": "set data.long_rows",
    "seed": "set seed at the top of the recipe",
    "data_seed": "set seed at the top of the recipe",
    "chat_template_path": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "pad_token": _TEMPLATE,
    "assistant_only_loss": _ANSWERS,
    "completion_only_loss": _ANSWERS,
    "dataset_text_field": _ROWS,
    "dataset_num_proc": "`prepare` makes the tokens; give it --workers",
    "dataset_kwargs": _ROWS,
    "model_init_kwargs": "set base.model and base.revision",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "greater_is_better": "it follows from metric_for_best_model: a loss is better small, an accuracy large",
    "include_num_input_tokens_seen": "metrics.jsonl has num_tokens in every line",
    "skip_memory_metrics": "measurements.json has each rank's peaks",
    "do_train": _COMMANDS,
    "do_eval": _COMMANDS,
    "do_predict": _COMMANDS,
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_token": "the token is read from the login or HF_TOKEN only",
}

_SUMMED_UP = "an evaluation adds up its numbers on each rank; no predictions are collected"
_BY_HAND = "the layers' forward and backward are written by hand and with kernels of their own; none is compiled"
_ROWS_IN_ORDER = "rows come in an order that a resumed run repeats on any number of ranks"
REFUSED = {
    "average_tokens_across_devices": "each answer token counts the same, on any number of ranks",
    "optim_target_modules": "it is for optimizers that do not work here (galore, apollo); see lora.target_modules",
    "use_cache": "nothing is generated while training",
    "router_aux_loss_coef": "it is for models with experts, Llama has none",
    "debug": "a step that is not finite stops the run and its rows are named",
    "logging_nan_inf_filter": "a loss that is not finite stops the run, it is never hidden",
    "trust_remote_code": "code from a model repository is never run",
    "torch_compile": _BY_HAND,
    "torch_compile_backend": _BY_HAND,
    "torch_compile_mode": _BY_HAND,
    "save_only_model": "a checkpoint is always whole, so that it can be resumed",
    "save_on_each_node": "machines share the run's folder",
    "enable_jit_checkpoint": "SIGTERM always saves",
    "ignore_data_skip": "resuming always continues at the next row",
    "prediction_loss_only": _SUMMED_UP,
    "eval_do_concat_batches": _SUMMED_UP,
    "eval_use_gather_object": _SUMMED_UP,
    "eval_accumulation_steps": _SUMMED_UP,
    "include_for_metrics": _SUMMED_UP,
    "batch_eval_metrics": _SUMMED_UP,
    "label_names": _SUMMED_UP,
    "dataloader_drop_last": "the last batch is filled up with rows that count nothing; no row is dropped",
    "dataloader_in_order": _ROWS_IN_ORDER,
    "shuffle_dataset": "each epoch takes the rows in an order of its own; see training.train_sampling_strategy",
    "length_column_name": "rows are not grouped by length; packing fills them",
    "remove_unused_columns": "rows have no columns but what the model needs",
}

Limit = tuple[Callable[[float], bool], str]
_ABOVE_0: Limit = (lambda value: value > 0, "above 0")
_NOT_BELOW_0: Limit = (lambda value: value >= 0, "0 or more")
_BELOW_1: Limit = (lambda value: 0 <= value < 1, "from 0 to below 1")
_COUNT: Limit = (lambda value: value >= 1, "1 or more")
_STEPS: Limit = (
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
    "a whole number of steps, or a share below 1",
)
LIMITS: dict[str, Limit] = {
    "num_train_epochs": _ABOVE_0,
    "max_steps": (lambda value: value >= 1 or value == -1, "a number of steps; -1: as num_train_epochs says"),
    "learning_rate": _ABOVE_0,
    "warmup_steps": (lambda value: value == 0 or _STEPS[0](value), _STEPS[1]),
    "weight_decay": _NOT_BELOW_0,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "adam_epsilon": _ABOVE_0,
    "max_grad_norm": _NOT_BELOW_0,
    "label_smoothing_factor": _BELOW_1,
    "neftune_noise_alpha": _ABOVE_0,
    "torch_empty_cache_steps": _COUNT,
    "logging_steps": _STEPS,
    "eval_steps": _STEPS,
    "save_steps": _STEPS,
    "eval_delay": _NOT_BELOW_0,
    "save_total_limit": _COUNT,
    "dataloader_num_workers": _NOT_BELOW_0,
    "dataloader_prefetch_factor": _COUNT,
    "pad_to_multiple_of": _COUNT,
}
CHOICES = {
    "loss_type": ("nll", "dft"),
    "train_sampling_strategy": ("random", "sequential"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "log_level": ("debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("debug", "info", "warning", "error", "critical", "passive"),
}
"Texts that a field may be, where its type does not say so."
NEEDS_WORKERS = (
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
)
"Fields that mean something, or are allowed, only where dataloader_num_workers is above 0."
