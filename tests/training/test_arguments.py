"""The `training:` block becomes an SFTConfig before any weight is read."""

import pytest
from ranks import run_ranks, train_here
from trl import SFTConfig

from fitune.errors import UsageError
from fitune.launching.run_folder import KEPT_WITH_THE_OPTIMIZER
from fitune.training.arguments import training_arguments


def test_what_transformers_refuses_is_refused_before_weights_are_read(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", training={"tf32": True})  # on the CPU; the command line says so earlier
    (tmp_path / "no_weights").mkdir()
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "no_weights" / file.name).write_bytes(file.read_bytes())
    base = run.recipe.base.model_copy(update={"model": str(tmp_path / "no_weights")})
    run = run.model_copy(update={"recipe": run.recipe.model_copy(update={"base": base})})
    with pytest.raises(RuntimeError, match=r"run\.yaml: training: refused by TRL's SFTConfig: --tf32 requires"):
        run_ranks(train_here, 1, run)


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("polynomial", {"lr_end": 1}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "warmup_type": "foo"}),
        ("cosine_with_min_lr", {"min_lr": 1e-4, "min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": "abc"}),
        ("cosine", {"num_cycles": "abc"}),
        ("inverse_sqrt", {"timescale": 0}),
    ],
)
def test_what_a_schedule_refuses_is_said_before_weights_are_read(schedule, kwargs, make_run, tmp_path):
    run = make_run(tmp_path, tmp_path, training={"lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs})
    with pytest.raises(UsageError, match=rf"training\.lr_scheduler_kwargs: refused by schedule {schedule}: ."):
        training_arguments(run)


def test_nor_does_one_that_follows_evaluations_take_any_number(make_run, tmp_path):
    training = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 1.5}}
    run = make_run(tmp_path, tmp_path, training=training | {"eval_strategy": "epoch"})
    with pytest.raises(UsageError, match=r"refused by schedule reduce_lr_on_plateau: Factor should be < 1\.0"):
        training_arguments(run)


@pytest.mark.parametrize(
    ("optim", "given"), [("sgd", "nesterov=true"), ("sgd", "momentum=-1"), ("rmsprop", "alpha=-1")]
)
def test_what_an_optimizer_refuses_is_said_before_weights_are_read(optim, given, make_run, tmp_path):
    run = make_run(tmp_path, tmp_path, training={"optim": optim, "optim_args": given})
    with pytest.raises(UsageError, match=rf"training\.optim_args: refused by optimizer {optim}: ."):
        training_arguments(run)


def test_what_a_resumed_run_keeps_is_by_default_what_trl_has(tmp_path):
    defaults = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert {key: getattr(defaults, key) for key in KEPT_WITH_THE_OPTIMIZER} == KEPT_WITH_THE_OPTIMIZER
