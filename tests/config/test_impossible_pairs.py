"""Settings that are good by themselves and cannot be together: both are named in one line."""

import pytest
from one_run import message_of

PAIRS = {
    "lora block with full": (("method=full",), ["'full'", "lora:", "method: lora"]),
    "lora without its block": (("lora=null",), ["'qlora'", "lora:"]),
    "method not in the profile": (("method=full", "lora=null"), ["profile_8b", "lora, qlora", "recipe_8b", "full"]),
    "more rows a pass than there are": (
        ("global_batch_size=3", "profile.micro_batch=3"),
        ["micro_batch 3", "micro_batch=2"],
    ),
    "GPUs and processes differ": (("profile.num_gpus=4",), ["num_gpus 4", "num_processes 2", "make them equal"]),
    "GPUs on the CPU": (("profile.num_gpus=0",), ["num_gpus 0", "use_cpu: false"]),
    "unknown accelerate config": (("profile.accelerate_config=fsdp_2x40bg",), ["'fsdp_2x40bg'", "accelerate config"]),
    "set without a value": (("seed",), ["--set seed", "key=value"]),
    "set without a key": (("=3",), ["--set =3", "key=value"]),
    "set a block whose keys are set": (
        ("lora.alpha=3", "lora=null"),
        ["--set lora=null: keys of 'lora' are set before"],
    ),
    "set a part of a value": (("seed=1", "seed.x=2"), ["--set seed.x=2", "'seed' already has a value"]),
    "set broken YAML": (("seed=[1",), ["--set seed=[1", "not valid YAML"]),
    "set an unknown key": (("sede=1",), ["with --set", "'sede'", "did you mean 'seed'?"]),
    "set an unknown field": (("training.max_step=1",), ["with --set", "did you mean 'training.max_steps'?"]),
    "set the profile to a value": (("profile=3",), ["profile"]),
    "set an unknown value": (("training.optim=adamw_torh",), ["training.optim", "did you mean 'adamw_torch'?"]),
    "set an unknown strategy": (("training.save_strategy=never",), ["allowed: best, epoch, no, steps"]),
    "set a negative number of steps": (("training.max_steps=-5",), ["training.max_steps: -5 is not a number of steps"]),
    "evaluate with an unknown metric": (
        ("training.metric_for_best_model=bleu",),
        ["'bleu'; allowed: loss, perplexity,"],
    ),
    "load the best of nothing": (
        ("training.load_best_model_at_end=true",),
        ["training.load_best_model_at_end needs evaluations", "training.eval_strategy"],
    ),
    "save the best of nothing": (("training.save_strategy=best",), ["training.save_strategy=best needs evaluations"]),
    "stop early without looking": (("early_stopping.patience=2",), ["early_stopping needs evaluations"]),
    "follow a metric that is not measured": (
        ("training.lr_scheduler_type=reduce_lr_on_plateau",),
        ["training.lr_scheduler_type=reduce_lr_on_plateau needs evaluations"],
    ),
    "a metric that nobody asks for": (
        ("training.eval_strategy=epoch", "training.metric_for_best_model=perplexity"),
        ["training.metric_for_best_model would change nothing"],
    ),
    "load the best and save none": (
        ("training.eval_strategy=epoch", "training.load_best_model_at_end=true", "training.save_strategy='no'"),
        ["training.save_strategy=no saves none"],
    ),
    "evaluate after the end": (
        ("training.eval_strategy=steps", "training.eval_steps=9", "training.max_steps=5"),
        ["training.eval_steps 9 is beyond training.max_steps 5"],
    ),
    "a field without its block": (("learning_rate=1e-4",), ["'learning_rate'; did you mean 'training.learning_rate'?"]),
    "another program's word": (("epochs=3",), ["did you mean 'training.num_train_epochs'?"]),
    "that word in the right block": (("training.epochs=3",), ["did you mean 'training.num_train_epochs'?"]),
    "a list without brackets": (
        ("lora.target_modules=q_proj,v_proj",),
        ["lora.target_modules: a list needs brackets: [q_proj, v_proj]"],
    ),
    "trackers without brackets": (("training.report_to=tensorboard,wandb",), ["brackets: [tensorboard, wandb]"]),
    "an absent tracker": (("training.report_to=neptune",), ["needs the package neptune", "pip install neptune"]),
    "an unknown tracker": (("training.report_to=tensorbord",), ["did you mean 'tensorboard'?"]),
    "a name for no tracker": (("training.run_name=x",), ["training.run_name is for training.report_to="]),
    "Adam's with another optimizer": (("training.optim=sgd", "training.adam_beta1=0.8"), ["would ignore it"]),
    "an argument that is none": (
        ("training.optim=sgd", "training.optim_args=momentm=0.9"),
        ["sgd has no argument 'momentm'; did you mean 'momentum'?"],
    ),
    "a schedule without its argument": (
        ("training.lr_scheduler_type=cosine_with_min_lr",),
        ["needs min_lr or min_lr_rate", "training.lr_scheduler_kwargs.min_lr=1e-6"],
    ),
    "an argument of another schedule": (
        ("training.lr_scheduler_kwargs.min_lr=1e-6",),
        ["schedule linear has no argument 'min_lr'"],
    ),
    "an argument that is no number": (
        ("training.lr_scheduler_type=cosine", "training.lr_scheduler_kwargs={num_cycles: .nan}"),
        ["training.lr_scheduler_kwargs.num_cycles: nan is not a finite number"],
    ),
    "half a step to warm up": (("training.warmup_steps=1.5",), ["warmup_steps: 1.5 is not a whole number of steps"]),
    "yes as a number": (("training.learning_rate=true",), ["training.learning_rate: True is not a number"]),
    "no as a number of steps": (("training.max_steps=false",), ["training.max_steps: False is not a whole number"]),
    "no epoch": (("training.num_train_epochs=0",), ["training.num_train_epochs: 0.0 is not above 0"]),
    "a seed that numpy refuses": (("seed=4294967296",), ["seed: Input should be less than 4294967296"]),
    "a step and a half": (("training.save_steps=1.5",), ["training.save_steps: 1.5 is not a whole number of steps"]),
    "a rate below 0": (("training.learning_rate=-1e-4",), ["training.learning_rate: -0.0001 is not above 0"]),
    "a loss that is none": (("training.loss_type=dtf",), ["did you mean 'dft'?", "training.loss_type"]),
    "set the training block": (("training=3",), ["training"]),
    "set a key of a list": (("lora.target_modules.x=3",), ["lora.target_modules"]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_impossible_pair_is_named_in_one_line(pair, write):
    sets, said = PAIRS[pair]
    message = message_of(write(), sets)
    for part in said:
        assert part in message
