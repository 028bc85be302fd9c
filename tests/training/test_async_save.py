"""Checkpoints that are written while training goes on: what they hold, when they are waited for, a disk that fails."""

import errno
import os
import threading
import time
from dataclasses import replace

import pytest
from patience import PATIENCE_SECONDS
from ranks import run_ranks, train_here

from fitune.errors import FituneError
from fitune.launching.heartbeat import Heartbeat
from fitune.output_folder import checkpoints
from fitune.training.checkpoint import CheckpointSaver
from fitune.training.manifest import find_damage, read_manifest

TRAINING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def _change_writing(before_writing, at_step_begin=lambda step: None) -> None:
    """In this process: calls the one in the thread that writes, with the checkpoint's step, the other in training."""
    complete, begin = CheckpointSaver._complete, Heartbeat.on_step_begin

    def changed(self, save, *args):
        write = save.write

        def later():
            before_writing(save.step)
            return write()

        return complete(self, replace(save, write=later), *args)

    def on_step_begin(self, args, state, control, **kwargs):
        at_step_begin(state.global_step)
        return begin(self, args, state, control, **kwargs)

    CheckpointSaver._complete, Heartbeat.on_step_begin = changed, on_step_begin


def _train_on_meanwhile(run) -> None:
    """Checkpoint 2 is written once step 3 has changed the weights."""
    step_3_is_done = threading.Event()

    def wait(step: int) -> None:
        assert step != 2 or step_3_is_done.wait(PATIENCE_SECONDS), "training did not go on"

    _change_writing(wait, lambda step: step_3_is_done.set() if step == 3 else None)
    train_here(run)


@pytest.mark.parametrize(("method", "processes"), [("lora", 1), ("lora", 2), ("full", 1), ("full", 2)])
def test_a_checkpoint_holds_the_step_it_is_named_after(method, processes, tiny_base, make_run, tmp_path):
    runs = [
        make_run(tiny_base, tmp_path / str(mode), method, processes=processes, training=TRAINING, async_save=mode)
        for mode in (True, False)
    ]
    run_ranks(_train_on_meanwhile, processes, runs[0])
    run_ranks(train_here, processes, runs[1])
    saved, expected = ([read_manifest(path).files for path in checkpoints(run.folder / "checkpoints")] for run in runs)
    assert len(saved) == len(expected) == 3
    for files, others in zip(saved, expected, strict=True):
        assert set(files) == set(others)
        for name in set(files) - {"trainer_state.json", "adapter/README.md"}:  # which have times, and the run's name
            assert files[name] == others[name], name


def _train_with_a_slow_first_save(run) -> None:
    """Checkpoint 2 is still being written when 4 is to be saved."""
    next_is_due, save = threading.Event(), CheckpointSaver.save

    def told(self, step, *args, **kwargs):
        if step == 4:
            next_is_due.set()
        return save(self, step, *args, **kwargs)

    def wait(step: int) -> None:
        if step == 2:
            assert next_is_due.wait(PATIENCE_SECONDS), "training did not go on"
            time.sleep(0.5)
        assert step == 2 or (run.folder / "checkpoints/checkpoint-2").is_dir(), "two saves at once"

    CheckpointSaver.save = told
    _change_writing(wait)
    train_here(run)


def test_a_save_waits_for_the_one_before(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", "lora", training=TRAINING, async_save=True)
    run_ranks(_train_with_a_slow_first_save, 1, run)
    assert [path.name for path in checkpoints(run.folder / "checkpoints")] == [f"checkpoint-{n}" for n in (2, 4, 6)]


def _train_on_a_disk_that_fails(run) -> tuple[str, list[int]]:
    """What training ends with where rank 1 cannot write checkpoint 2, and the steps that were begun."""
    failed, begun = threading.Event(), []

    def fail(step: int) -> None:
        if step == 2:
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device", "a file")

    def begin(step: int) -> None:
        begun.append(step)
        if step == 2 and rank_fails:
            assert failed.wait(PATIENCE_SECONDS)
        if step == 2:
            time.sleep(1)  # the ranks' threads tell each other

    rank_fails = os.environ["RANK"] == "1"
    _change_writing(fail if rank_fails else lambda step: None, begin)
    with pytest.raises(FituneError) as caught:
        train_here(run)
    return str(caught.value), begun


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_disk_that_fails_stops_all_ranks_at_the_next_step(replicas, tiny_base, make_run, tmp_path):
    training = TRAINING | {"max_steps": 40, "save_steps": 0.05}
    run = make_run(tiny_base, tmp_path / "run", "lora", processes=2, replicas=replicas, training=training)
    for said, begun in run_ranks(_train_on_a_disk_that_fails, 2, run):
        assert said.startswith(f"step 2 was not saved in {run.folder}/checkpoints: [Errno 28] No space left on device")
        assert "make room, then go on with" in said
        assert begun == [0, 1, 2]
    assert checkpoints(run.folder / "checkpoints") == []


def _fail_while_a_save_is_under_way(run) -> None:
    """All ranks end with an error in step 4, of which the thread that writes checkpoint 2 knows nothing."""
    is_ending = threading.Event()

    def wait(step: int) -> None:
        is_ending.wait(PATIENCE_SECONDS)
        time.sleep(0.5)

    def stop(step: int) -> None:
        if step == 3:
            is_ending.set()
            raise FituneError("a bad step")

    _change_writing(wait, stop)
    with pytest.raises(FituneError, match="a bad step"):
        train_here(run)


def test_a_run_that_stops_completes_the_save_that_is_under_way(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", "lora", processes=2, training=TRAINING)
    run_ranks(_fail_while_a_save_is_under_way, 2, run)
    [checkpoint] = checkpoints(run.folder / "checkpoints")
    assert checkpoint.name == "checkpoint-2"
    assert find_damage(checkpoint) is None
