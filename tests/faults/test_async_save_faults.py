"""A run that ends, or is ended, while a checkpoint is written beside training: real commands, two ranks."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import Running, changed, losses, saved_steps, train_command

SLOW_DISK = """
def change(rank):
    from fitune.weights.safetensors_files import CheckpointWriter

    write = CheckpointWriter.write
    def held(self, *args):
        while rank == 0 and "checkpoint-2" in str(self.folder) and os.path.exists({file!r}):
            time.sleep(0.01)
        return write(self, *args)
    CheckpointWriter.write = held

    from fitune.launching.heartbeat import Heartbeat
    begin = Heartbeat.on_step_begin
    def crash(self, args, state, control, **kwargs):
        if {crashes} and rank == 1 and state.global_step == 3:
            raise ValueError("a fault")
        return begin(self, args, state, control, **kwargs)
    Heartbeat.on_step_begin = crash
"""
"Rank 0 writes nothing of checkpoint 2 while the file is there; rank 1 may crash in step 4."


class SlowDisk:
    """A run of six steps that saves every second one; `while_it_writes` is given when step 3 is done meanwhile."""

    def __init__(self, base: Path, prepared: Path, folder: Path):
        self.folder, self.log, self.hold = folder / "run", folder / "log", folder / "hold"
        self.command = train_command(base, prepared, self.folder, 6, **{"training.save_steps": 2})

    def while_it_writes(self, crashes: bool = False) -> Running:
        self.hold.touch()
        environment = changed(SLOW_DISK.format(file=str(self.hold), crashes=crashes), self.folder.parent)
        running = Running(self.command, self.log, **environment)
        running.wait_for(lambda: (self.folder / "metrics.jsonl").exists() and losses(self.folder)[-1:] >= [(3,)])
        assert saved_steps(self.folder) == []
        return running

    def resume(self) -> str:
        self.hold.unlink(missing_ok=True)
        resumed = Running([*self.command, "--resume"], self.log)
        assert resumed.wait() == 0, self.log.read_text()[-3000:]
        assert saved_steps(self.folder) == [4, 6]
        return self.log.read_text()


@pytest.fixture
def slow_disk(tiny_base, prepared, tmp_path) -> SlowDisk:
    return SlowDisk(tiny_base, prepared, tmp_path)


def test_killed_meanwhile_it_leaves_no_checkpoint_that_is_not_whole(slow_disk):
    running = slow_disk.while_it_writes()
    running.ranks()[0].kill()
    assert running.wait() == 1
    assert saved_steps(slow_disk.folder) == []
    assert "no checkpoint was written: training begins at the first step" in slow_disk.resume()
    assert not list((slow_disk.folder / "checkpoints").glob(".*"))


def test_told_to_stop_meanwhile_it_completes_both_saves(slow_disk):
    running = slow_disk.while_it_writes()
    running.process.send_signal(signal.SIGTERM)
    slow_disk.hold.unlink()
    assert running.wait() == 75, running.log.read_text()[-3000:]
    saved = saved_steps(slow_disk.folder)
    assert saved[0] == 2 and saved[-1] == losses(slow_disk.folder)[-1][0]
    assert f"interrupted after step {saved[-1]} of 6, which is saved" in running.log.read_text()


def test_a_rank_that_crashes_meanwhile_ends_the_run(slow_disk):
    running = slow_disk.while_it_writes(crashes=True)
    assert running.wait(120) == 1
    text = running.log.read_text()
    assert "ValueError: a fault" in text
    assert saved_steps(slow_disk.folder) == []
    slow_disk.resume()
