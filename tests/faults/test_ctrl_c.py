"""Ctrl-C in what trains nothing: one line, exit code 130, nothing half written. Real commands."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import Running
from ranks import run_ranks, train_here

from fitune.config.accelerate_config import written_out
from fitune.config.run import dump
from fitune.errors import STOPPED_BY_CTRL_C


@pytest.fixture(scope="module")
def finished(tiny_base, make_run, tmp_path_factory) -> Path:
    run = make_run(tiny_base, tmp_path_factory.mktemp("ctrl_c") / "run", processes=2, training={"max_steps": 1})
    run_ranks(train_here, 2, run)
    (run.folder / "run.yaml").write_text(dump(run))
    (run.folder / "accelerate.yaml").write_text(written_out(run.accelerate))
    return run.folder


WHILE_IT_FORKS = """
import os, signal, sys

def interrupt():
    if "concurrent.futures.process" in sys.modules:
        os.kill(os.getpid(), signal.SIGINT)

os.register_at_fork(before=interrupt)
"""
"Ctrl-C comes in the moment in which a worker is forked."


def stopped_when(begun, command: list[str], log: Path) -> list[str]:
    """The lines of a command to which a terminal's Ctrl-C is sent once `begun(running)` holds: to all of its group."""
    running = Running([sys.executable, "cli.py", *map(str, command)], log)
    running.wait_for(lambda: begun(running))
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.wait() == STOPPED_BY_CTRL_C, log.read_text()[-3000:]
    return [line for line in log.read_text().splitlines() if line.strip()]


def has_ranks(running: Running) -> bool:
    with suppress(psutil.Error):
        children = psutil.Process(running.process.pid).children()
        return sum(any("fitune.training." in word for word in child.cmdline()) for child in children) == 2
    return False


@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "Hello"]], ids=["eval", "generate"])
def test_ranks_that_only_read_are_stopped(command, finished, tmp_path):
    name, *flags = command
    assert stopped_when(has_ranks, [name, finished, *flags], tmp_path / "log") == ["stopped"]
    assert not (finished / "eval.json").exists()


def reads_on(running: Running) -> bool:
    """Its workers are there."""
    with suppress(psutil.Error):
        return len(psutil.Process(running.process.pid).children()) >= 2
    return False


def test_prepare_leaves_nothing(prepared, tiny_base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((prepared / "train.jsonl").read_text() * 400)
    output = tmp_path / "out" / "data"
    command = ["prepare", "--workers", "2", "--dataset", rows, "--tokenizer", tiny_base, "--output", output]
    lines = stopped_when(reads_on, command, tmp_path / "log")
    assert lines[-1] == "stopped" and "Traceback" not in " ".join(lines)
    assert not list(output.parent.iterdir())


def test_a_ctrl_c_while_prepare_forks_its_workers_is_not_lost(prepared, tiny_base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((prepared / "train.jsonl").read_text() * 400)
    (tmp_path / "sitecustomize.py").write_text(WHILE_IT_FORKS)
    output = tmp_path / "out" / "data"
    command = ["prepare", "--workers", "2", "--dataset", rows, "--tokenizer", tiny_base, "--output", output]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    running = Running([sys.executable, "cli.py", *map(str, command)], tmp_path / "log", PYTHONPATH=path)
    assert running.wait() == STOPPED_BY_CTRL_C, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "log").read_text().splitlines()[-1] == "stopped"
    assert not list(output.parent.iterdir())
