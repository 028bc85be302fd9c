"""Evaluations at the end of each epoch: a run that is interrupted and resumed has those of one that was not."""

import json
import os
import shutil
import signal

import pytest
from ranks import run_ranks, train_here

from fitune.errors import FituneError, Interrupted
from fitune.training.trainer import ShardedSFTTrainer

EPOCH, STEPS = 3, 9
HALVES = {"factor": 0.5, "patience": 0, "threshold": 10.0, "threshold_mode": "abs"}
"At each evaluation but the first: none is better by so much."
TRAINING = {
    "max_steps": STEPS, "learning_rate": 5e-3, "lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0,
    "lr_scheduler_kwargs": HALVES, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": EPOCH,
}  # fmt: skip
OPTIONS = {"batch": 16, "micro_batch": 4, "packing": True, "max_length": 112}


@pytest.fixture
def new_run(make_run, tiny_base, tmp_path):
    def new(name: str, processes: int = 1, **training):
        options = OPTIONS | {"processes": processes, "training": TRAINING | training}
        return make_run(tiny_base, tmp_path / name, "lora", **options)

    return new


def _train_until(run, step: int, number: int) -> bool:
    """Whether training was interrupted: in the step after `step` this process gets a signal."""
    compute = ShardedSFTTrainer.compute_loss

    def told(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), number)
        return compute(trainer, *args, **kwargs)

    ShardedSFTTrainer.compute_loss = told
    try:
        train_here(run)
    except Interrupted:
        return True
    return False


def _train_into_an_error(run) -> None:
    def fail(*_, **__):
        raise FituneError("no room")

    ShardedSFTTrainer.training_step = fail
    with pytest.raises(FituneError, match="no room"):
        train_here(run)


def _curves(run) -> dict[str, dict[int, float]]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "learning_rate", "eval_loss")
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in keys}


def _resumed(run):
    return run.model_copy(update={"resume": True})


def test_a_checkpoint_of_an_epochs_last_step_holds_its_evaluation(new_run):
    run = new_run("run")
    run_ranks(train_here, 1, run)
    curves = _curves(run)
    assert list(curves["eval_loss"]) == [EPOCH, 2 * EPOCH, STEPS]
    rates = list(curves["learning_rate"].values())
    assert rates == [5e-3] * 2 * EPOCH + [2.5e-3] * EPOCH
    for newest in (EPOCH, 2 * EPOCH):
        killed = new_run(f"killed after {newest}")
        shutil.copytree(run.folder, killed.folder)
        for step in range(newest + EPOCH, STEPS + 1, EPOCH):
            shutil.rmtree(killed.folder / "checkpoints" / f"checkpoint-{step}")
        shutil.rmtree(killed.result_folder)
        run_ranks(train_here, 1, _resumed(killed))
        assert _curves(killed) == curves


@pytest.mark.parametrize(("processes", "step"), [(1, 4), (2, 5)])
def test_a_signal_within_an_epoch_brings_no_evaluation(processes, step, new_run):
    """At 5 the step that is finished is the epoch's last."""
    run, calm = new_run("run", processes), new_run("calm", processes)
    assert run_ranks(_train_until, processes, run, step, signal.SIGTERM) == [True] * processes
    curves = _curves(run)
    assert list(curves["loss"]) == list(range(1, step + 2))
    assert list(curves["eval_loss"]) == ([EPOCH, 2 * EPOCH] if step == 5 else [EPOCH])
    run_ranks(train_here, processes, _resumed(run))
    run_ranks(train_here, processes, calm)
    assert _curves(run) == _curves(calm)


def test_a_run_that_ends_within_an_epoch_is_evaluated_there(new_run):
    run = new_run("run", max_steps=EPOCH + 1)
    run_ranks(train_here, 1, run)
    assert list(_curves(run)["eval_loss"]) == [EPOCH, EPOCH + 1]


def test_the_base_is_evaluated_at_the_start_alone(new_run):
    run = new_run("run", eval_on_start=True)
    assert run_ranks(_train_until, 1, run, 4, signal.SIGTERM) == [True]
    run_ranks(train_here, 1, _resumed(run))
    assert list(_curves(run)["eval_loss"]) == [0, EPOCH, 2 * EPOCH, STEPS]


def test_a_resume_that_fails_before_its_first_step_changes_nothing(new_run):
    run = new_run("run", max_steps=EPOCH)
    run_ranks(train_here, 1, run)
    kept = {name: (run.folder / name).read_text() for name in ("run.yaml", "finished.json", "metrics.jsonl")}
    longer = _resumed(new_run("run"))
    run_ranks(_train_into_an_error, 1, longer)
    assert {name: (run.folder / name).read_text() for name in kept} == kept
    assert run.result_folder.is_dir() and not (run.folder / "passed.json").exists()
    run_ranks(train_here, 1, longer)
    assert "max_steps: 9" in (run.folder / "run.yaml").read_text()
    assert json.loads((run.folder / "finished.json").read_text())["step"] == STEPS
