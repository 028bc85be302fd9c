"""Signals, dead and hung ranks, a second run: real commands, two ranks, one run through all of it.

At the end the run that suffered has the losses and the adapter, byte for byte, of one that nobody disturbed.
"""

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS

sys.path.insert(0, str(Path(__file__).parent))

from commands import ADAPTER, Hold, Running, changed, losses, saved_steps, start_on_two_machines, train_command

STEPS = 12


@pytest.fixture(scope="module")
def undisturbed(tiny_base, prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("life")
    running = Running(train_command(tiny_base, prepared, folder / "run", STEPS), folder / "log")
    assert running.wait() == 0, running.log.read_text()[-3000:]
    return folder / "run"


def test_a_run_survives_what_happens_to_it(undisturbed, tiny_base, prepared, tmp_path):
    folder = tmp_path / "run"
    command, hold = train_command(tiny_base, prepared, folder, STEPS), Hold(tmp_path)

    def held_after(step: int, *flags: str, **environment) -> Running:
        hold.after(step)
        running = Running([*command, *flags], tmp_path / f"log-{step}", **hold.environment, **environment)
        running.wait_for(lambda: (folder / f"checkpoints/checkpoint-{step}").exists())
        return running

    running = held_after(1)
    second = Running([*command, "--resume"], tmp_path / "log-second")
    assert second.wait() == 2
    assert re.search(
        rf"process {running.process.pid} on \S+ trains here; wait for it or stop it", second.log.read_text()
    )
    running.process.send_signal(signal.SIGTERM)
    hold.release()
    assert running.wait() == 75
    text = running.log.read_text()
    step = saved_steps(folder)[-1]
    assert f"stopped: interrupted after step {step} of {STEPS}, which is saved" in text
    assert "Traceback" not in text and "before the first step" not in text
    assert (folder / "run.lock").read_text() == "", "another host may go on"

    running = held_after(step + 1, "--resume")
    running.ranks()[1].send_signal(signal.SIGTERM)  # one rank; the other hears of it
    hold.release()
    assert running.wait() == 75
    step = saved_steps(folder)[-1]
    assert f"stopped: interrupted after step {step} of {STEPS}" in running.log.read_text()

    running = held_after(step + 2, "--resume", FITUNE_HUNG_AFTER_SECONDS="4")
    hung = running.ranks()[1]
    hung.suspend()
    assert running.wait() == 1
    hold.release()
    text = running.log.read_text()
    assert f"rank 1 (pid {hung.pid} on {socket.gethostname()}): no progress for 4 s; all ranks were ended" in text
    assert "was ended by" not in text, "the watch's own kills are no news"
    assert not hung.is_running() or hung.status() == "zombie"

    step = saved_steps(folder)[-1]
    running = held_after(step + 1, "--resume", "--max-restarts", "1")
    killed = running.ranks()[1]
    killed.kill()
    hold.release()
    assert running.wait() == 0, running.log.read_text()[-3000:]
    text = running.log.read_text()
    assert f"error: rank 1 (pid {killed.pid}) was ended by SIGKILL" in text
    assert "restart 1 of 1, from the newest checkpoint" in text

    assert losses(folder) == losses(undisturbed)
    assert (folder / ADAPTER).read_bytes() == (undisturbed / ADAPTER).read_bytes()


def test_a_killed_launcher_takes_its_ranks_along(undisturbed, tiny_base, prepared, tmp_path):
    folder = tmp_path / "run"
    command, hold = train_command(tiny_base, prepared, folder, STEPS), Hold(tmp_path)
    hold.after(2)
    running = Running(command, tmp_path / "log", **hold.environment)
    running.wait_for(lambda: (folder / "checkpoints/checkpoint-2").exists())
    ranks = running.ranks()
    os.kill(running.process.pid, signal.SIGKILL)
    running.wait()
    for rank in ranks.values():
        rank.wait(PATIENCE_SECONDS)
    hold.after(4)
    impatient = Running([*command, "--resume"], tmp_path / "log-impatient", **hold.environment)
    impatient.wait_for(lambda: (folder / "checkpoints/checkpoint-4").exists())
    for _ in range(2):  # the second signal ends a run at once, though it rests and would never end the step
        impatient.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert impatient.wait() == 1
    hold.release()
    saved = saved_steps(folder)[-1]
    as_it_was = [*command[:3], "--resume", str(folder)]
    resumed = Running(as_it_was, tmp_path / "log-resumed")
    assert resumed.wait() == 0, resumed.log.read_text()[-3000:]
    assert f"{folder}: goes on after step {saved} of {STEPS}: checkpoint-{saved}" in resumed.log.read_text()
    assert losses(folder) == losses(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_rank_that_waits_for_another_to_join_ends_when_the_run_is_told_to_stop(number, tiny_base, prepared, tmp_path):
    """It waits in torch's C++, where no handler of Python's runs; torch's launcher would kill it after 30 s."""
    late = changed("def change(rank): time.sleep(600 * rank)\n", tmp_path)
    stopped = Running(train_command(tiny_base, prepared, tmp_path / "run", STEPS), tmp_path / "log", **late)
    stopped.wait_for(lambda: "joining 2 processes" in stopped.log.read_text())
    told = time.monotonic()
    stopped.process.send_signal(number)
    assert stopped.wait() == 75, stopped.log.read_text()[-2000:]
    assert time.monotonic() - told < 20
    text = stopped.log.read_text()
    assert text.count("stopped: before the first step, with nothing to save") == 1
    assert "Traceback" not in text and "was ended by" not in text


def test_a_run_told_to_stop_before_its_first_step_can_go_on(undisturbed, tiny_base, prepared, tmp_path):
    """Whether the signal finds the ranks importing or loading, and for a rank that stands still while it starts."""
    folder = tmp_path / "run"
    command = train_command(tiny_base, prepared, folder, STEPS)
    stopped = Running(command, tmp_path / "log", slowly=True)
    stopped.wait_for(lambda: len(stopped.ranks()) == 2)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.log.read_text()[-2000:]
    text = stopped.log.read_text()
    assert text.count("stopped: before the first step, with nothing to save") == 1
    assert "Traceback" not in text and "was ended by" not in text and "finishing" not in text

    hold = Hold(tmp_path)
    hold.after(0)
    hung = Running([*command, "--resume"], tmp_path / "log-hung", FITUNE_HUNG_AFTER_SECONDS="3", **hold.environment)
    hung.wait_for(lambda: "reading the base" in hung.log.read_text())
    hung.ranks()[1].suspend()
    assert hung.wait() == 1
    assert "no progress for 3 s; all ranks were ended" in hung.log.read_text()

    resumed = Running([*command, "--resume"], tmp_path / "log-resumed")
    assert resumed.wait() == 0, resumed.log.read_text()[-3000:]
    assert losses(folder) == losses(undisturbed)


def test_two_machines_share_a_run(undisturbed, tiny_base, prepared, tmp_path):
    folder = tmp_path / "run"
    one_copy = train_command(tiny_base, prepared, folder, STEPS)  # two would add gradients up in another order
    for machine in start_on_two_machines(one_copy, tmp_path):
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
    assert losses(folder) == losses(undisturbed)
    assert (folder / ADAPTER).read_bytes() == (undisturbed / ADAPTER).read_bytes()
