"""A machine that reads or writes far longer than another one is waited for; one that dies meanwhile is noticed."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from commands import Running, changed, losses, start_on_two_machines, train_command

IS_SLOW = """
def change(rank):
    from pathlib import Path
    import torch.distributed as dist
    from fitune.weights import load as loading

    load, folder = loading.load_weights, Path({folder!r})
    def slow_load(*args, **kwargs):
        found = load(*args, **kwargs)
        (folder / f"has-read-{{rank}}").touch()
        while rank and not (folder / "has-read-0").exists():
            time.sleep(0.01)
        while rank and (folder / "hold").exists():
            time.sleep(0.01)
        time.sleep(2 * rank)
        (folder / f"goes-on-{{rank}}").touch()
        return found
    loading.load_weights = slow_load

    from fitune.training import state

    write = state.write_training_state
    def slow_write(*args):
        found = write(*args)
        while rank and not (folder / "has-written-0").exists():
            time.sleep(0.01)
        time.sleep(2 * rank)
        (folder / f"has-written-{{rank}}").touch()
        return found
    state.write_training_state = slow_write

    def checked(collective):
        def call(*args, **kwargs):
            for before in ("goes-on", "has-written"):
                if rank == 0 and (folder / f"{{before}}-0").exists() and not (folder / f"{{before}}-1").exists():
                    (folder / "under-a-timeout").touch()
            return collective(*args, **kwargs)
        return call
    for name in ("barrier", "broadcast_object_list", "all_gather_object", "all_reduce"):
        setattr(dist, name, checked(getattr(dist, name)))
"""
"""Machine 1 reads its base and writes its part of a checkpoint more slowly; machine 0 notes waiting in a collective."""
QUICKLY = """
import os, sys
sys.path.insert(0, os.getcwd())
from fitune.launching import other_machines
other_machines.LOOK_SECONDS, other_machines.GONE_SECONDS, other_machines.FOLLOWS_WITHIN_SECONDS = 0.2, 12, 1
from fitune.cli import cli
sys.argv[0] = "fitune"
cli()
"""
NOTICED_WITHIN_SECONDS = 180
"Many times what it takes."


def test_a_machine_that_reads_or_writes_slowly_meets_no_timeout_of_a_collective(tiny_base, prepared, tmp_path):
    environment = changed(IS_SLOW.format(folder=str(tmp_path)), tmp_path)
    command = train_command(tiny_base, prepared, tmp_path / "run", 1)
    for machine in start_on_two_machines(command, tmp_path, **environment):
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
    assert (tmp_path / "goes-on-1").exists() and (tmp_path / "has-written-1").exists()
    assert not (tmp_path / "under-a-timeout").exists()
    assert [step for step, *_ in losses(tmp_path / "run")] == [1]


def test_a_machine_that_dies_while_it_reads_is_noticed_and_the_others_end(tiny_base, prepared, tmp_path):
    """Its power was cut, as far as the launcher of machine 0 sees: no word, and no sign of life."""
    (tmp_path / "hold").touch()
    environment = changed(IS_SLOW.format(folder=str(tmp_path)), tmp_path)
    quickly = tmp_path / "quickly.py"
    quickly.write_text(QUICKLY)
    python, _, *words = train_command(tiny_base, prepared, tmp_path / "run", 1)
    second, first = start_on_two_machines([python, str(quickly), *words], tmp_path, **environment)
    try:
        first.wait_for((tmp_path / "goes-on-0").exists)
        first.wait_for((tmp_path / "has-read-1").exists)
        _stop_altogether(second)
        code = first.wait(NOTICED_WITHIN_SECONDS)
    finally:
        for machine in (first, second):
            machine.process.kill()  # and with it its rank
    said = first.log.read_text()
    assert code == 1 and "error: machine 1 of 2 has shown no sign of life for 1" in said, said[-3000:]
    assert "; the ranks here were ended" in said and "Traceback" not in said


@pytest.fixture(scope="module")
def trained(tiny_base, prepared, tmp_path_factory) -> Path:
    """A run of two machines."""
    folder = tmp_path_factory.mktemp("trained")
    for machine in start_on_two_machines(train_command(tiny_base, prepared, folder / "run", 1), folder):
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
    return folder / "run"


def _eval_on_two_machines(run: Path, folder: Path, *program: str) -> list[Running]:
    """Machine 1, then machine 0."""
    command = [sys.executable, *(program or ["cli.py"]), "eval", str(run), "--main-process-ip", "127.0.0.1"]
    environment = changed(IS_SLOW.format(folder=str(folder)), folder)
    return [Running([*command, "--machine-rank", str(n)], folder / f"log-{n}", **environment) for n in (1, 0)]


def test_nor_does_it_in_eval(trained, tmp_path):
    for machine in _eval_on_two_machines(trained, tmp_path):
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
    assert (tmp_path / "goes-on-1").exists() and not (tmp_path / "under-a-timeout").exists()
    assert (trained / "eval.json").exists()


def test_a_machine_that_is_killed_while_it_reads_for_eval_is_noticed_and_the_others_end(trained, tmp_path):
    (tmp_path / "hold").touch()
    (tmp_path / "quickly.py").write_text(QUICKLY)
    second, first = _eval_on_two_machines(trained, tmp_path, str(tmp_path / "quickly.py"))
    try:
        first.wait_for((tmp_path / "goes-on-0").exists)
        first.wait_for((tmp_path / "has-read-1").exists)
        for process in (*psutil.Process(second.process.pid).children(recursive=True), second.process):
            process.kill()
        code = first.wait(NOTICED_WITHIN_SECONDS)
    finally:
        for machine in (first, second):
            machine.process.kill()
    said = first.log.read_text()
    assert code == 1 and "error: machine 1 of 2 is gone; the ranks here were ended" in said, said[-3000:]
    assert "Traceback" not in said and "SIGKILL" not in said


def _stop_altogether(machine: Running) -> None:
    """Its sockets stay open, as those of a machine do whose power was cut."""
    launcher = psutil.Process(machine.process.pid)
    for process in (launcher, *launcher.children(recursive=True)):
        os.kill(process.pid, signal.SIGSTOP)
