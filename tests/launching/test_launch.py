"""The three ways to start a run give the same run: cli.py, accelerate launch, torchrun. Real commands."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import quick_python
from click.testing import CliRunner
from patience import PATIENCE_SECONDS
from results import empty_adapter

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
sys.path.insert(0, str(Path(__file__).parent))

from commands import changed
from terminals import in_terminal, left_on_screen

from fitune.cli import cli
from fitune.config import run as runs
from fitune.errors import INTERRUPTED, FituneError, Interrupted
from fitune.launching import launch
from fitune.launching.launch import TOLD, _first_failure
from fitune.launching.run_folder import finish
from fitune.planning.fill import resolve
from fitune.training import train

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


@pytest.fixture(scope="module")
def options(tiny_base, prepared) -> list[str]:
    """A recipe and profile on this test's own model and rows: four steps, a checkpoint after each."""
    sets = {
        "base.model": tiny_base,
        "data.prepared": prepared,
        "training.max_steps": 4,
        "training.save_steps": 1,
        "training.logging_steps": 1,
        "training.report_to": "none",
        "lora.r": 4,
    }
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    return ["train", "tiny_qlora", "--profile", "cpu_2proc", *flags]


def start(command: list, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of Python that finds the libraries imported already."""
    return quick_python.run(command, os.environ | environment, ROOT, PATIENCE_SECONDS)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory) -> Path:
    """A run folder that `cli.py train` left."""
    folder = tmp_path_factory.mktemp("launch") / "cli"
    done = start(["cli.py", *options, "--output", folder])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"result: {folder / 'adapter'}" in done.stdout
    return folder


def test_on_a_terminal_each_line_is_whole_and_the_live_line_is_gone_in_the_end(options, tmp_path):
    code, raw = in_terminal(
        [
            "cli.py",
            *options,
            "--set",
            "training.eval_strategy=steps",
            "--set",
            "training.eval_steps=2",
            "--output",
            tmp_path / "run",
        ],
        quickly=True,
    )
    assert code == 0, raw[-3000:]
    seen = [line for line in left_on_screen(raw) if line]
    shown = re.sub(r"\x1b\[[\d;]*m", "", raw)
    assert re.search(r"step \d/4  loss \d\.\d{4}", shown), "drawn with each log line"
    rows = [line for line in seen if re.match(r" +\d/4 ", line)]
    assert len(rows) == 6 and all(len(line) <= 79 for line in rows), seen
    assert sum("held out: loss" in line for line in rows) == 2
    assert not any("it/s" in line or "{'" in line for line in seen)
    assert [line[:8] for line in seen[-4:]] == ["result: ", "curve:  ", "page:   ", "next:   "]


def test_a_port_that_is_taken_is_one_line(tiny_base, tmp_path):
    """On machine 0 of several, as `eval` may meet it; where there is one, accelerate takes another port."""
    run = resolve("tiny_qlora", "cpu_2proc", (f"base.model={tiny_base}",), str(tmp_path / "run"))
    config = tmp_path / "mine.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = Path(run.accelerate.path).read_text()
        text = text.replace("main_process_port: 0", f"main_process_port: {port}")
        config.write_text(f"{text}\nnum_machines: 2\nmachine_rank: 0\nmain_process_ip: 127.0.0.1\n")
        with pytest.raises(FituneError, match=rf"^accelerate launch refused {config}: .*port `{port}`, but another"):
            launch.launch(run, "fitune.training.evaluate", config=config)


@pytest.mark.parametrize("name", ["multiprocessing.api", "agent.server.api"])
def test_torchs_launcher_prints_no_page(name, tiny_base, tmp_path, monkeypatch, caplog):
    """Of a rank that failed, or of a machine 0 that ended a moment before another one."""
    run = resolve("tiny_qlora", "cpu_2proc", (f"base.model={tiny_base}",), str(tmp_path / "run"))
    logger = logging.getLogger(f"torch.distributed.elastic.{name}")
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda _: logger.error("Traceback"))
    assert launch.launch(run, "fitune.training.evaluate") == 0
    assert not caplog.records


@pytest.mark.parametrize("is_told", [False, True])
def test_a_machine_that_is_gone_before_processes_start_is_one_line(tiny_base, tmp_path, monkeypatch, is_told, capfd):
    """It was there when the machines met. That it is gone may be told by then."""
    monkeypatch.setattr(launch, "JOIN_SECONDS", 1)
    run = resolve("tiny_qlora", "cpu_2proc", (f"base.model={tiny_base}",), str(tmp_path / "run"))
    config = tmp_path / "mine.yaml"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = Path(run.accelerate.path).read_text().replace("main_process_port: 0", f"main_process_port: {port}")
    config.write_text(f"{text}\nnum_machines: 2\nmachine_rank: 0\nmain_process_ip: 127.0.0.1\n")

    @contextmanager
    def beside(end_ranks):
        if is_told:
            end_ranks(Interrupted("machine 1 of 2 was told to stop"))
        yield

    def start() -> int:
        return launch.launch_until_stopped(run, "fitune.training.evaluate", config=config, beside=beside)

    began = time.monotonic()
    if is_told:
        assert start() == INTERRUPTED
    else:
        with pytest.raises(FituneError, match=r"^another machine was gone before the processes of all were started;"):
            start()
    assert time.monotonic() - began < 40
    assert capfd.readouterr().err == ""


def test_ranks_with_gpus_get_segments_that_can_grow_whoever_starts_them(monkeypatch, tmp_path):
    monkeypatch.setattr(train.logging, "set_verbosity_error", lambda: None)
    for profile, expected in (("single_gpu", "expandable_segments:True"), ("cpu_2proc", None)):
        run = resolve("tiny_qlora" if expected is None else "llama3_8b_qlora", profile, output=str(tmp_path / profile))
        monkeypatch.setattr(os, "environ", {})
        launch._set_environment(run)
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
        monkeypatch.setattr(os, "environ", {})
        run.folder.mkdir()
        (run.folder / "run.yaml").write_text(runs.dump(run))
        train.run_stage(run.folder, lambda run: None)
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "Hi"]], ids=["eval", "generate"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "mine.yaml: no such file; it says how the run's processes start: put it, or a copy, at {own}"),
        ("num_processes: [2", "{own}:1: not valid YAML"),
        (
            "distributed_type: FSDP\nnum_proceses: 2\n",
            "{own}: unknown key 'num_proceses'; did you mean 'num_processes'?",
        ),
    ],
    ids=["gone", "no yaml", "typo"],
)
def test_an_accelerate_config_that_is_gone_or_damaged_is_one_line(
    tiny_base, make_run, tmp_path, monkeypatch, command, text, said
):
    """Before a process starts."""
    run = make_run(tiny_base, tmp_path / "run", "lora")
    run = run.model_copy(update={"accelerate": run.accelerate.model_copy(update={"path": str(tmp_path / "mine.yaml")})})
    empty_adapter(run.result_folder)
    (run.folder / "run.yaml").write_text(runs.dump(run))
    own = run.folder / "accelerate.yaml"
    if text is not None:
        own.write_text(text)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda parsed: pytest.fail("started"))
    outcome = CliRunner().invoke(cli, [command[0], str(run.folder), *command[1:]])
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1 and said.format(own=own) in outcome.stderr


def test_torchrun_and_accelerate_give_the_same_losses(finished, options, tmp_path):
    shown = start(["cli.py", "show", *options[1:]])
    starters = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS],
        "accelerate": ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"],
    }
    for name, starter in starters.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.yaml").write_text(shown.stdout)
        done = start([*starter, "-m", "fitune.training.train", folder / "run.yaml"])
        assert done.returncode == 0, done.stderr[-3000:]
        assert losses(folder) == losses(finished), name
    again = start([*starter, "-m", "fitune.training.train", folder])  # would begin anew over what is there
    assert again.returncode == 1 and f"error: {folder} exists; add --resume to continue it" in again.stderr
    assert "SIGKILL" not in again.stderr, (
        "the other rank, which waits for the refused one to join, ends when it is told"
    )
    assert losses(folder) == losses(finished)


@pytest.mark.parametrize("late", ["no rank is late", "rank 0 is late"])
def test_an_error_in_the_processes_is_one_line(finished, tmp_path, late):
    wait = "def change(rank): time.sleep(4 * (rank == 0))\n"
    environment = changed(wait, tmp_path) if late == "rank 0 is late" else {}
    text = (finished / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(re.sub(r"num_processes: 2", "num_processes: 3", text))
    done = start(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            RANKS,
            "-m",
            "fitune.training.train",
            tmp_path / "run.yaml",
        ],
        **environment,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "2 processes were started, the run needs 3" in lines[0]


@pytest.mark.parametrize(
    "failures, told, expected",
    [
        ({0: (70, 5), 1: (-9, 5)}, [], 70),  # killed from outside: a crash, and rank 1 is named
        ({0: (-9, 36), 1: (1, 5)}, [], 1),  # explained by rank 1; torch killed rank 0 half a minute later
        ({0: (-15, 5), 1: (75, 5)}, [], 75),
        ({0: (-15, 5), 1: (75, 5)}, [15], TOLD),  # rank 0 had not begun to listen, and said nothing
        ({0: (75, 5), 1: (-15, 5)}, [15], 75),
        ({0: (-15, 5), 1: (-15, 5)}, [2], TOLD),
        ({2: (-15, 5), 1: (-15, 6)}, [15], TOLD),  # of a machine without rank 0
        ({2: (-15, 5), 1: (75, 6)}, [15], 75),
        ({2: (-15, 5), 1: (-15, 6)}, [], 70),  # somebody ended them
        ({0: (70, 5), 1: (1, 5)}, [], 1),
        ({0: (-6, 5), 1: (-9, 5)}, [], 70),  # gloo aborts a process whose neighbour is gone
        ({0: (-9, 5), 1: (-9, 5)}, [2, 2], 70),  # by fitune, which has said so
    ],
)
def test_the_failure_that_ended_a_run_is_found(failures, told, expected, capsys):
    from types import SimpleNamespace

    found = {r: SimpleNamespace(exitcode=code, timestamp=when, pid=r) for r, (code, when) in failures.items()}
    assert _first_failure(found, told, explained=()) == expected
    is_named = failures[1][0] == -9 and len(told) < 2
    assert ("rank 1 (pid 1) was ended by SIGKILL" in capsys.readouterr().err) == is_named


@pytest.mark.parametrize(("is_done", "code"), [(True, 0), (False, INTERRUPTED)])
def test_a_run_that_is_told_to_stop_when_all_is_done_is_finished(is_done, code, monkeypatch, tmp_path):
    run = resolve("tiny_qlora", "cpu_2proc", ("training.max_steps=4",), str(tmp_path / "run"))
    run.folder.mkdir()
    finish(run, 2, 1.0)  # before

    def told_to_stop(run, *_, told, **__) -> int:
        told.append(signal.SIGTERM)
        if is_done:
            finish(run, 4, 2.0)
        return TOLD

    monkeypatch.setattr(launch, "launch", told_to_stop)
    assert launch.train_with_restarts(run, resume=True, max_restarts=0, place={}, quiet=True) == code
