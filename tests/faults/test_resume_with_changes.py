"""A run that is resumed with other settings does what it is asked now, and is finished when that is done."""

import json
import os
import shutil
import signal

import pytest
from ranks import run_ranks, train_here

from fitune.config.run import load
from fitune.errors import UsageError
from fitune.launching.run_folder import nothing_left

STEPS = 4
TRAINING = {
    "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_base, make_run, tmp_path_factory):
    run = make_run(tiny_base, tmp_path_factory.mktemp("changes") / "run", "lora", training=TRAINING)
    run_ranks(train_here, 1, run)
    return run


def resumed(finished, folder, **training):
    """A copy of the finished run that is resumed with changed `training:` fields."""
    shutil.copytree(finished.folder, folder)
    recipe = finished.recipe.model_copy(update={"training": finished.recipe.training | training})
    return finished.model_copy(update={"recipe": recipe, "output_dir": str(folder), "resume": True})


def steps_with(run, key: str) -> list[int]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if key in line]


def steps_saved(run) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (run.folder / "checkpoints").iterdir())


def _killed_in_its_second_step(run) -> None:
    from fitune.training.trainer import ShardedSFTTrainer

    train, done = ShardedSFTTrainer.training_step, []

    def training_step(*args, **kwargs):
        if done:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return train(*args, **kwargs)

    ShardedSFTTrainer.training_step = training_step
    train_here(run)


def _what_it_says(run) -> str:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as printed:
        train_here(run)
    return printed.getvalue()


def test_a_longer_run_that_was_killed_is_trained_to_its_end(finished, tmp_path):
    """The checkpoint and the result of the shorter one stand in the folder; neither says what is asked now."""
    run = resumed(finished, tmp_path / "run", max_steps=STEPS + 2)
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(_killed_in_its_second_step, 1, run)
    assert not (run.folder / "finished.json").exists()
    said = run_ranks(_what_it_says, 1, run)[0]
    assert f"{run.folder}: goes on after step {STEPS} of {STEPS + 2}: checkpoint-{STEPS}\n" in said
    assert steps_with(run, "loss") == list(range(1, STEPS + 3))
    assert json.loads((run.folder / "finished.json").read_text())["step"] == STEPS + 2


def test_a_run_that_is_told_to_make_no_more_steps_has_those_settings(finished, tmp_path):
    """Interrupted after a checkpoint, it needs nothing but its result."""
    run = resumed(finished, tmp_path / "run", max_steps=2)
    for name in ("finished.json", "checkpoints/checkpoint-4"):
        path = run.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run.result_folder)
    assert steps_saved(run) == [2]
    run_ranks(train_here, 1, run)
    assert load(run.folder).recipe.training["max_steps"] == 2
    assert json.loads((run.folder / "finished.json").read_text())["step"] == 2
    assert "is finished after step 2" in nothing_left(load(run.folder))


def test_how_often_to_log_evaluate_and_save_is_what_is_asked_now(finished, tmp_path):
    changes = {"max_steps": 10, "logging_steps": 3, "eval_steps": 5, "save_steps": 3, "save_total_limit": 9}
    run = resumed(finished, tmp_path / "run", **changes)
    said = run_ranks(_what_it_says, 1, run)[0]
    assert steps_with(run, "loss") == [1, 2, 3, 4, 6, 9]
    assert steps_with(run, "eval_loss") == [4, 5, 10]
    assert steps_saved(run) == [2, 4, 6, 9, 10]
    assert "do not match" not in said


def test_one_checkpoint_is_kept_where_one_is_asked_for(finished, tmp_path):
    run = resumed(finished, tmp_path / "run", max_steps=STEPS + 1, save_total_limit=1)
    run_ranks(train_here, 1, run)
    assert steps_saved(run) == [STEPS + 1]


def test_fewer_steps_than_were_trained_are_refused(finished, tmp_path):
    run = resumed(finished, tmp_path / "run", max_steps=STEPS - 1)
    (run.folder / "finished.json").unlink()
    with pytest.raises(RuntimeError, match=rf"checkpoint-{STEPS} is {STEPS} steps long, {STEPS - 1} are asked for"):
        run_ranks(train_here, 1, run)
    assert UsageError.exit_code == 2
