"""`--max-restarts`: which ends of a run are followed by another start, and the exit code that is left."""

import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from fitune.environment import HEARTBEATS
from fitune.errors import CRASHED, INTERRUPTED, FituneError, Interrupted
from fitune.launching import launch
from fitune.launching.heartbeat import Watch
from fitune.launching.run_status import stopped_before_a_step
from fitune.planning.fill import resolve

SIGNALLED = 1


@pytest.mark.parametrize(
    ("ends", "most", "code", "resumed"),
    [
        ([(0, 0)], 2, 0, [False]),
        ([(CRASHED, 0), (0, 0)], 2, 0, [False, True]),
        ([(CRASHED, 0)] * 3, 2, 1, [False, True, True]),
        ([(CRASHED, 0)], 0, 1, [False]),
        ([(2, 0)], 2, 2, [False]),  # an error that was explained would only come again
        ([(INTERRUPTED, SIGNALLED)], 2, INTERRUPTED, [False]),
        ([(CRASHED, SIGNALLED)], 2, INTERRUPTED, [False]),  # told to stop while it started
        ([(CRASHED, 2)], 2, 1, [False]),  # told twice: ended at once, and not started again
    ],
)
def test_only_a_crash_is_followed_by_another_start(ends, most, code, resumed, monkeypatch, tmp_path):
    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    left, starts = list(ends), []

    def once(run, resume, *_):
        starts.append(resume)
        return left.pop(0)

    monkeypatch.setattr(launch, "_train_once", once)
    assert launch.train_with_restarts(run, resume=False, max_restarts=most, place={}) == code
    assert starts == resumed


@pytest.mark.parametrize(("has_begun", "code"), [(True, INTERRUPTED), (False, launch.TOLD)])
def test_rank_0_that_is_ended_on_its_way_out_was_interrupted(has_begun, code, monkeypatch, tmp_path):
    """Only before the first step is there nothing that was saved."""
    monkeypatch.setenv(HEARTBEATS, "")
    monkeypatch.setattr(launch, "settings_to_train", lambda folder: folder)
    monkeypatch.setattr(launch, "launch", lambda *_, **__: launch.TOLD)
    monkeypatch.setattr(Watch, "has_begun_to_train", lambda self: has_begun)
    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    assert launch._train_once(run, False, {}, lambda *_: None, launch.alone, None) == (code, 0)


def test_a_run_that_goes_on_and_is_stopped_before_a_step_says_how_it_goes_on(tmp_path):
    assert stopped_before_a_step(tmp_path) == "stopped: before the first step, with nothing to save"
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    said = "stopped: before another step, with nothing new to save; go on with: "
    assert stopped_before_a_step(tmp_path) == f"{said}python cli.py train --resume {tmp_path}"


@pytest.mark.parametrize(("reason", "code"), [(FituneError("gone"), 1), (Interrupted("told to stop"), INTERRUPTED)])
@pytest.mark.parametrize("started", [True, False])
def test_ranks_that_were_ended_for_another_machine_are_not_started_again(reason, code, started, monkeypatch, tmp_path):
    """They crash then, and would wait for it anew. Where they were not started yet, their launcher waits in vain."""
    monkeypatch.setenv(HEARTBEATS, "")
    monkeypatch.setattr(launch, "settings_to_train", lambda folder: folder)
    starts = []

    def launched(*_, **__) -> int:
        starts.append(1)
        if not started:
            raise FituneError("another machine was gone before the processes of all were started")
        return CRASHED

    monkeypatch.setattr(launch, "launch", launched)

    @contextmanager
    def beside(end_ranks):
        end_ranks(reason)
        yield

    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    assert launch.train_with_restarts(run, resume=False, max_restarts=3, place={}, beside=beside) == code
    assert len(starts) == 1


def test_launchers_wait_for_each_other_for_long_only_after_a_crash(monkeypatch, tmp_path):
    """All were there a moment before the first start; a crash is noticed sooner here and later there."""
    monkeypatch.setenv(HEARTBEATS, "")
    monkeypatch.setattr(launch, "settings_to_train", lambda folder: folder)
    waited = []
    monkeypatch.setattr(launch, "launch", lambda *_, join_seconds, **__: waited.append(join_seconds) or CRASHED)
    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    assert launch.train_with_restarts(run, resume=False, max_restarts=2, place={}) == 1
    assert waited == [launch.JOIN_SECONDS, None, None]


def test_a_crash_of_what_has_nothing_to_save_ends_with_code_1(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "launch", lambda *_, **__: CRASHED)
    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    assert launch.launch_until_stopped(run, "fitune.training.evaluate") == 1


@pytest.mark.parametrize(("reason", "code"), [(FituneError("gone"), 1), (Interrupted("told to stop"), INTERRUPTED)])
def test_ranks_that_evaluate_are_ended_for_another_machine_with_its_code(reason, code, monkeypatch, tmp_path):
    """And are not said to have been killed for a lack of RAM."""
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "fitune.training.evaluate"])

    def launched(*_, explained: set, **__) -> int:
        assert rank.wait() == -signal.SIGKILL and rank.pid in explained
        return CRASHED

    monkeypatch.setattr(launch, "launch", launched)

    @contextmanager
    def beside(end_ranks):
        end_ranks(reason)
        yield

    run = resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    assert launch.launch_until_stopped(run, "fitune.training.evaluate", beside=beside) == code
