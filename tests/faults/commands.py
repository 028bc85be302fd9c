"""Real `cli.py train` commands for fault injection: a tiny run of two ranks, its ranks' pids, its results."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from patience import PATIENCE_SECONDS
from quick_python import Program

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter/adapter_model.safetensors"


def train_command(base: Path, prepared: Path, output: Path, steps: int, **sets) -> list[str]:
    """A run that saves after each step."""
    sets = {
        "base.model": base, "data.prepared": prepared, "training.max_steps": steps, "training.save_steps": 1,
        "training.logging_steps": 1, "training.report_to": "none", "lora.r": 4, **sets,
    }  # fmt: skip
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "cli.py", "train", "tiny_qlora", "--profile", "cpu_2proc", "--output", str(output), *flags]


def accelerate_text(ranks: int, offloaded: bool) -> str:
    """An accelerate config on the CPU; offloaded, as a profile with weights in host RAM has it."""
    text = (ROOT / "accelerate_configs/cpu_2proc.yaml").read_text()
    text = text.replace("num_processes: 2", f"num_processes: {ranks}")
    return text.replace("fsdp_version: 2", "fsdp_version: 2\n  fsdp_offload_params: true") if offloaded else text


WHEN_TRAINER_IS_IMPORTED = """
import itertools, os, sys, time
from importlib.abc import MetaPathFinder

class Change(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("fitune.training.checkpoint", "fitune.training.trainer") and "RANK" in os.environ:
            sys.meta_path.remove(self)
            change(int(os.environ["RANK"]))

sys.meta_path.insert(0, Change())
"""
HOLD = """
def change(rank):
    from fitune.launching.heartbeat import Heartbeat

    begin = Heartbeat.on_step_begin
    def held(self, args, state, control, **kwargs):
        while os.path.exists({file!r} + str(state.global_step)):
            time.sleep(0.01)
        return begin(self, args, state, control, **kwargs)
    Heartbeat.on_step_begin = held
"""


def changed(code: str, folder: Path) -> dict[str, str]:
    """The environment in which ranks call `change(rank)`, which `code` defines, before they train."""
    (folder / "sitecustomize.py").write_text(code + WHEN_TRAINER_IS_IMPORTED)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


class Hold:
    """Ranks started with `environment` rest once the step of the last `after` is saved, until they are released.

    So a run is where a test wants it, and not yet over, whatever else the machine does.
    """

    def __init__(self, folder: Path):
        self.file = folder / "hold-after-"
        self.environment = changed(HOLD.format(file=str(self.file)), folder)

    def after(self, step: int) -> None:
        self.release()
        Path(f"{self.file}{step}").touch()

    def release(self) -> None:
        for file in self.file.parent.glob(f"{self.file.name}*"):
            file.unlink()


class Running:
    """A started command; what it prints is in `log`.

    A command of Python starts at once, with the libraries imported already; with `slowly` Python imports them.
    """

    def __init__(self, command: list[str], log: Path, *, slowly: bool = False, **environment: str):
        self.log = log
        environment = os.environ | environment
        with log.open("w") as output, Path(os.devnull).open() as nothing:
            if command[0] == sys.executable and not slowly:
                streams = (nothing.fileno(), output.fileno(), output.fileno())
                self.process = Program(command[1:], environment, ROOT, streams)
            else:
                streams = {"stdout": output, "stderr": subprocess.STDOUT}
                self.process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        return self.process.wait(timeout)

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that are alive, by number."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):  # it may be gone by now
                    if "fitune.training.train" in child.cmdline():
                        found[int(child.environ()["RANK"])] = child
        return found

    def wait_for(self, condition) -> None:
        """Until `condition()` holds; fails with the log if the command ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)


def start_on_two_machines(
    command: list[str], folder: Path, places: tuple[list[str], list[str]] = ([], []), **environment: str
) -> list[Running]:
    """Two launchers with one rank each, as on two machines that share a folder; their logs are in `folder`.

    `places` come before the commands of machine 0 and machine 1.
    """
    accelerate = folder / "two_machines.yaml"
    text = (ROOT / "accelerate_configs/cpu_2proc.yaml").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = text.replace("main_process_port: 0", f"main_process_port: {port}")
    accelerate.write_text(text + "num_machines: 2\nmachine_rank: 0\nmain_process_ip: 127.0.0.1\n")
    command = [*command, "--set", f"profile.accelerate_config={accelerate}"]
    return [
        Running([*places[n], *command, "--machine-rank", str(n)], folder / f"log-{n}", **environment) for n in (1, 0)
    ]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("checkpoint-*"))
